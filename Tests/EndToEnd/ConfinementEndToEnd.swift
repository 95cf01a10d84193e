import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// What a guest that came from another host can reach on this one, and what goes on working for it.
@Suite(.serialized, .timeLimit(.minutes(15)))
struct ConfinementEndToEnd {
    private func read(_ path: String) throws -> String {
        String(decoding: try DurableFile.read(path) ?? [], as: UTF8.self)
    }

    private func status(_ pid: Int32, _ key: String) throws -> String {
        let line = try read("/proc/\(pid)/status").split(separator: "\n").first { $0.hasPrefix("\(key):") }
        return line.map { $0.drop { $0 != "\t" }.dropFirst().description } ?? ""
    }

    /// A process has no privileges and cannot get any, and its system calls are filtered.
    private func expectConfined(_ pid: Int32) throws {
        for key in ["CapPrm", "CapEff", "CapAmb"] { #expect(try status(pid, key) == "0000000000000000", "\(key)") }
        if geteuid() == 0 { #expect(try status(pid, "CapBnd") == "0000000000000000") }
        #expect(try status(pid, "NoNewPrivs") == "1")
        #expect(try status(pid, "Seccomp") == "2")
        #expect(try !read("/proc/\(pid)/environ").contains("HOME="))
    }

    private func process(_ lab: Lab, _ side: String = "b") throws -> EmulatorProcess {
        let process = try lab.guests(side).load("web1")?.process
        return try #require(process?.isRunning == true ? process : nil)
    }

    /// What QEMU says to a command; nil when it did it.
    private func refusal(_ lab: Lab, _ command: String, _ arguments: JSONValue, side: String = "b") async throws
        -> String?
    {
        try await lab.monitor(side) { monitor in
            do {
                let answer = try await monitor.execute(command, arguments)
                // The human monitor says what went wrong as an ordinary answer.
                return answer.string.flatMap { $0.isEmpty ? nil : $0 }
            } catch let error as QMPError { return "\(error)" }
        }
    }

    private func expectDenied(
        _ lab: Lab,
        _ command: String,
        _ arguments: JSONValue,
        _ reason: String = "Permission denied"
    )
        async throws
    {
        let said = try await refusal(lab, command, arguments)
        #expect(said?.contains(reason) == true, "\(command) \(arguments.text): \(said ?? "done")")
    }

    /// A guest that has arrived on host b, from an owner who wanted it not to be confined.
    private func makeArrived(_ lab: Lab, format: [String] = [], more: [String] = []) async throws -> Int32 {
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 2)
        let display = Int(try await freePort()) - 5900
        try await lab.startIdleGuest(
            disks: [disk],
            more: [
                "-sandbox", "off", "-serial", "file:\(lab.directory.file("serial.log"))", "-vnc",
                "127.0.0.1:\(display)",
            ]
                + more
        )
        try await lab.startDestination()
        let moved = try await lab.migrate(more: format)
        #expect(moved.code == 0, "\(moved.all)")
        return try process(lab).pid
    }

    @Test func aGuestThatCameReachesItsOwnFilesAndNothingElse() async throws {
        let lab = try Lab()
        let pid = try await makeArrived(lab)
        try expectConfined(pid)
        let words = try read("/proc/\(pid)/cmdline").split(separator: "\0").map(String.init)
        let filters = words.indices.filter { words[$0] == "-sandbox" }.map { words[$0 + 1] }
        #expect(filters == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"])
        // Everything that it has open is its own, or has no name.
        let state = lab.state("b")
        let own = ["\(state)/guests/web1/", "\(state)/images/web1/", "\(state)/new/guests/web1/"]
        for name in DurableFile.list("/proc/\(pid)/fd") {
            var buffer = [CChar](repeating: 0, count: 4096)
            let count = readlink("/proc/\(pid)/fd/\(name)", &buffer, buffer.count)
            let path = String(decoding: buffer.prefix(max(count, 0)).map { UInt8(bitPattern: $0) }, as: UTF8.self)
            guard path.hasPrefix("/"), !["/dev/null", "/dev/urandom"].contains(path), !path.hasPrefix("/memfd:") else {
                continue
            }
            #expect(own.contains(where: path.hasPrefix), "\(path)")
        }
        let victim = lab.directory.file("victim")
        try DurableFile.write([UInt8](repeating: 7, count: 4096), to: victim, mode: 0o666)
        chmod(victim, 0o666)
        for path in [victim, "/etc/passwd", "\(state)/guests/web1/guest.json", "\(state)/destination.lock"] {
            for isReadOnly in [true, false] {
                try await expectDenied(
                    lab,
                    "blockdev-add",
                    ["driver": "file", "node-name": "x", "filename": .string(path), "read-only": .bool(isReadOnly)]
                )
            }
            try await expectDenied(
                lab,
                "pmemsave",
                ["val": 0, "size": 16, "filename": .string(path)],
                "ermission denied"
            )
            try await expectDenied(
                lab,
                "chardev-add",
                ["id": "x", "backend": ["type": "file", "data": ["out": .string(path)]]]
            )
        }
        // A host's socket elsewhere cannot be made, a port not opened, a program not run, another format not led astray.
        let socket = lab.directory.file("made.sock")
        try await expectDenied(
            lab,
            "nbd-server-start",
            ["addr": ["type": "unix", "data": ["path": .string(socket)]]]
        )
        try await expectDenied(
            lab,
            "nbd-server-start",
            ["addr": ["type": "inet", "data": ["host": "127.0.0.1", "port": "0"]]]
        )
        let sidecar = "\(state)/images/web1/sidecar"
        try DurableFile.write([0], to: sidecar)
        let made = try await Tool.run([
            "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", victim, "-F", "raw", sidecar, "1M",
        ])
        #expect(made.code == 0, "\(made.all)")
        try await expectDenied(
            lab,
            "blockdev-add",
            ["driver": "qcow2", "node-name": "y", "file": ["driver": "file", "filename": .string(sidecar)]]
        )
        #expect(try process(lab).pid == pid)
        #expect(!DurableFile.exists(socket))
        #expect(try DurableFile.read(victim) == [UInt8](repeating: 7, count: 4096))
        // A fork is the end of an older QEMU, and an error of a newer one.
        let ran = try await refusal(lab, "migrate", ["uri": "exec:/bin/true"])
        #expect(ran != nil)
    }

    @Test(arguments: [[], ["--format", "qcow2"]])
    func aConfinedGuestGoesOnWithAllThatItNeeds(_ format: [String]) async throws {
        let lab = try Lab()
        _ = try await makeArrived(lab, format: format)
        let images = "\(lab.state("b"))/images/web1"
        let image = "\(images)/disk.raw"
        // Its image is locked against others.
        let kind = format.last ?? "raw"
        let locked = try await Tool.run(["qemu-io", "-f", kind, "-c", "write 0 512", image])
        #expect(locked.code != 0 && locked.all.contains("lock"), "\(locked.all)")
        // Disks and snapshots in its own directory, made by others or by itself.
        let added = "\(images)/added.raw"
        // The guest's user can use what is given to it.
        let script = "truncate -s 1M \(added) && chown --reference=\(images) \(added)"
        #expect(try await Tool.run(["sh", "-c", script]).code == 0)
        let node: JSONValue = [
            "driver": "raw", "node-name": "added", "file": ["driver": "file", "filename": .string(added)],
        ]
        #expect(try await refusal(lab, "blockdev-add", node) == nil)
        let snapshot: JSONValue = [
            "device": "virtio0", "snapshot-file": .string("\(images)/overlay.qcow2"), "format": "qcow2",
        ]
        #expect(try await refusal(lab, "blockdev-snapshot-sync", snapshot) == nil)
        #expect(try await refusal(lab, "block_resize", ["node-name": "added", "size": 2_097_152]) == nil)
        #expect(try await refusal(lab, "blockdev-del", ["node-name": "added"]) == nil)
        // The display listens.
        let display = try await lab.monitor("b") { try await $0.execute("query-vnc") }
        #expect(display["enabled"] == true, "\(display.text)")
    }

    @Test func aConfinedGuestIsExportedStartedAgainAndMovesOn() async throws {
        let lab = try Lab()
        let pid = try await makeArrived(lab)
        let elsewhere = try await lab.crossdock(
            ["export", "web1", "--listen", "localhost:0", "--state-dir", lab.state("b"), "--snapshot", "--scratch-dir"]
                + [lab.directory.directory("elsewhere")] + lab.credentials()
        )
        #expect(
            elsewhere.code != 0 && elsewhere.errors.contains("its QEMU reaches no scratch files in"),
            "\(elsewhere.all)"
        )
        for more in [["--snapshot"], []] {
            let export = try ChildProcess(
                [Lab.crossdock, "export", "web1", "--listen", "localhost:0", "--state-dir", lab.state("b")]
                    + lab.credentials() + more
            )
            try await export.wait(for: "an export") { export.output.contains("listening on") }
            let port =
                export.output.split(separator: "\n").first { $0.contains("listening on") }?.split(separator: ":").last
                ?? ""
            let uri = "nbds://localhost:\(port)/web1/virtio0?tls-certificates=\(lab.pki.directory)"
            let copy = lab.directory.file("copy.raw")
            let copied = try await Tool.run(["nbdcopy", uri, copy])
            #expect(copied.code == 0, "\(copied.all)")
            let (there, here) = (
                try ChunkDigests.digest(of: "\(lab.state("b"))/images/web1/disk.raw"), try ChunkDigests.digest(of: copy)
            )
            #expect(there == here)
            export.signal(SIGTERM)
            #expect(try await export.finish(seconds: 30).code == 0, "\(export.errors)")
        }
        #expect(try process(lab).pid == pid)
        // Started again it is confined as before.
        #expect(try await lab.crossdock(["guest", "stop", "web1", "--force", "--state-dir", lab.state("b")]).code == 0)
        let started = try await lab.crossdock(["guest", "start", "web1", "--state-dir", lab.state("b")])
        #expect(started.code == 0, "\(started.all)")
        try expectConfined(try process(lab).pid)
        try await expectDenied(
            lab,
            "blockdev-add",
            ["driver": "file", "node-name": "x", "filename": "/etc/passwd", "read-only": true]
        )
        // It moves on, and back.
        try await lab.startDestination("c")
        let away = try await lab.migrate(from: "b", port: lab.controlPort(of: "c"))
        #expect(away.code == 0, "\(away.all)")
        try expectConfined(try process(lab, "c").pid)
    }

    /// What belongs to a guest's user may be anything by the time that root looks at it again.
    @Test(.enabled(if: geteuid() == 0, "only root has users to give"))
    func linksThatAGuestMakesLeadNowhere() async throws {
        let lab = try Lab()
        let pid = try await makeArrived(lab)
        let state = lab.state("b")
        var status = stat()
        #expect(stat("/proc/\(pid)", &status) == 0)
        let user = status.st_uid
        #expect(Lab.guestUsers.contains(user))
        let victims = lab.directory.directory("victims")
        let secret = "\(victims)/secret"
        try DurableFile.write([UInt8](repeating: 7, count: 16 << 20), to: secret)
        chmod(victims, 0o700)
        func link(_ target: String, _ path: String) {
            rename(path, path + ".moved")
            #expect(symlink(target, path) == 0 && lchown(path, user, user) == 0, "\(path)")
        }
        func expectUntouched() throws {
            for path in [victims, secret] {
                #expect(lstat(path, &status) == 0 && status.st_uid == 0 && status.st_gid == 0, "\(path)")
            }
            #expect(DurableFile.list(victims) == ["secret"])
        }
        // A snapshot makes its scratch files below a directory of the guest's, which is a link now.
        link(victims, "\(state)/guests/web1/run/scratch")
        let export = try await lab.crossdock(
            ["export", "web1", "--listen", "localhost:0", "--state-dir", state, "--snapshot"] + lab.credentials(),
            seconds: 60
        )
        #expect(export.code != 0, "\(export.all)")
        try expectUntouched()
        // The image is one when the guest is started again.
        #expect(try await lab.crossdock(["guest", "stop", "web1", "--force", "--state-dir", state]).code == 0)
        link(secret, "\(state)/images/web1/disk.raw")
        link(victims, "\(state)/guests/web1/run/more")
        let started = try await lab.crossdock(["guest", "start", "web1", "--state-dir", state])
        #expect(started.code != 0, "\(started.all)")
        try expectUntouched()
    }

    @Test(.enabled(if: geteuid() == 0, "only root has users to give"))
    func eachGuestHasAUserOfItsOwnThatReachesNobodyElsesSockets() async throws {
        let lab = try Lab()
        let pid = try await makeArrived(lab)
        let other = try await lab.makeImage("other.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest("web2", disks: [other])
        let moved = try await lab.migrate("web2")
        #expect(moved.code == 0, "\(moved.all)")
        let second = try #require(try lab.guests("b").load("web2")?.process)
        func user(_ path: String) throws -> UInt32 {
            var status = stat()
            guard lstat(path, &status) == 0 else { throw TestFailure("\(path): \(errno)") }
            return status.st_uid
        }
        let users = [try user("/proc/\(pid)"), try user("/proc/\(second.pid)")]
        #expect(users[0] != users[1])
        let state = lab.state("b")
        for (name, own) in zip(["web1", "web2"], users) {
            #expect(Lab.guestUsers.contains(own))
            #expect(try user("\(state)/images/\(name)") == own)
            for file in DurableFile.list("\(state)/images/\(name)") {
                #expect(try user("\(state)/images/\(name)/\(file)") == own)
            }
            #expect(try user("\(state)/guests/\(name)/guest.json") == 0)
        }
        // The groups are none but its own.
        #expect(try status(pid, "Groups").split(separator: " ").isEmpty)
        // Whom a confined QEMU could reach by its path, if nothing but Landlock were in the way.
        for path in ["\(state)/guests/web2/qmp.sock", "\(state)/guests/web2/status.sock", "\(state)/control.sock"] {
            #expect(DurableFile.exists(path))
            try await expectDenied(
                lab,
                "chardev-add",
                [
                    "id": "x",
                    "backend": [
                        "type": "socket",
                        "data": ["addr": ["type": "unix", "data": ["path": .string(path)]], "server": false],
                    ],
                ]
            )
        }
        // A user comes back only when nothing of it is left.
        let file = lab.directory.file("users.json")
        let pool = GuestUsers(users[0]...users[0], file: file, places: ["\(state)/images"])
        #expect(throws: GuestError.self) { try pool.take() }
    }

    @Test func whatAHostLacksIsSaidAndCanBeAskedFor() async throws {
        let lab = try Lab()
        try await lab.startDestination()
        let missing = ConfinementPolicy.missing()
        for sentence in missing { #expect(lab.destination?.errors.contains(sentence) == true) }
        #expect(missing.isEmpty == (lab.destination?.errors.contains("confinement:") == false))
        let both = try await lab.crossdock(
            ["destination", "--state-dir", lab.state("c"), "--no-confinement", "--require-confinement"]
                + lab.credentials()
        )
        #expect(both.code == 64 && both.errors.contains("exclude each other"), "\(both.all)")
        guard geteuid() == 0 else { return }
        // A plain user has no users to give to guests.
        let plain = lab.directory.directory("plain")
        chmod(lab.directory.path, 0o755)
        #expect(chown(plain, 65534, 65534) == 0)
        let as65534 = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
        let refused = try await Tool.run(
            as65534 + [Lab.crossdock, "destination", "--state-dir", "\(plain)/state", "--require-confinement"]
                + [
                    "--listen", "127.0.0.1:0", "--nbd-listen", "127.0.0.1:0", "--object",
                    "tls-creds-psk,id=tls0,dir=\(plain)",
                ]
                + ["--tls-creds", "tls0"]
        )
        #expect(refused.code != 0, "\(refused.all)")
    }

    @Test func withoutConfinementOnlySystemCallsAreFiltered() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 2)
        try await lab.startIdleGuest(disks: [disk], more: ["-sandbox", "off"])
        try await lab.startDestination(more: ["--no-confinement"])
        let agent = try #require(lab.destination)
        #expect(agent.errors.contains("guests are not confined"), "\(agent.errors)")
        let moved = try await lab.migrate()
        #expect(moved.code == 0, "\(moved.all)")
        let pid = try process(lab).pid
        #expect(try status(pid, "Seccomp") == "2")
    }
}
