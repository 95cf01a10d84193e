import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// The disks of running guests, read by backup tools.
@Suite(.serialized, .timeLimit(.minutes(15)))
struct ExportEndToEnd {
    /// A running `crossdock export`.
    final class Served {
        let process: ChildProcess
        let lab: Lab

        init(_ lab: Lab, _ guests: [String], _ more: [String] = [], credentials: [String]? = nil) async throws {
            self.lab = lab
            process = try ChildProcess(
                lab.prefix + [Lab.crossdock, "export"] + guests
                    + ["--listen", "localhost:0", "--state-dir", lab.state("a")] + (credentials ?? lab.credentials())
                    + more
            )
            try await process.wait(for: "an export") { [process] in process.output.contains("listening on") }
        }

        var port: String {
            process.output.split(separator: "\n").first { $0.contains("listening on") }
                .flatMap { $0.split(separator: ":").last }.map(String.init) ?? ""
        }
        /// The bitmap that the snapshot began.
        var bitmap: String {
            process.output.firstRange(of: "snapshot ").map { range in
                String(process.output[range.upperBound...].prefix { $0 != " " })
            } ?? ""
        }

        func uri(_ export: String, pki: String? = nil) -> String {
            "nbds://localhost:\(port)/\(export)?tls-certificates=\(pki ?? lab.pki.directory)"
        }

        func stop() async throws -> ToolResult {
            process.signal(SIGTERM)
            return try await process.finish(seconds: 30)
        }
    }

    private func shell(_ script: String, seconds: Int = 60) async throws -> String {
        let result = try await Tool.run(["sh", "-ec", script], seconds: seconds)
        guard result.code == 0 else { throw TestFailure("\(script): \(result.all)") }
        return result.output
    }

    /// Lets the guest's device write, as the guest would (`qemu-io` of the human monitor).
    private func guestWrites(_ lab: Lab, _ command: String, drive: String = "virtio0", guest: String = "web1")
        async throws
    {
        // What it prints goes to QEMU's own output; whoever reads the disk afterwards sees whether it was written.
        _ = try await lab.monitor("a", guest) { monitor in
            try await monitor.execute(
                "human-monitor-command",
                ["command-line": .string("qemu-io \(drive) \"\(command)\"")]
            )
        }
    }

    private func nodesLeft(_ lab: Lab, guest: String = "web1") async throws -> [String] {
        try await lab.monitor("a", guest) { monitor in
            var left = try await monitor.blockGraph().nodes.keys.filter { $0.hasPrefix("xde-") }.sorted()
            left += try await monitor.blockExports().map(\.id)
            return left
        }
    }

    @Test func runningDisksOfSeveralGuestsAreServedReadOnlyOverTLS() async throws {
        let lab = try Lab()
        let (first, second) = (
            try await lab.makeImage("first.raw", megabytes: 32, data: 4), lab.directory.file("second.vmdk")
        )
        _ = try await shell(
            "qemu-img create -q -f vmdk \(second) 48M; qemu-io -f vmdk -c 'write -P 9 1M 1M' \(second) >/dev/null"
        )
        try await lab.startIdleGuest("web1", disks: [first])
        let command = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-display", "none"]
        let more = [
            "-blockdev", "driver=vmdk,node-name=q0,file.driver=file,file.filename=\(second)", "-device",
            "virtio-blk-pci,drive=q0,id=data",
        ]
        let started = try await lab.crossdock(
            ["guest", "start", "db", "--state-dir", lab.state("a"), "--"] + command + more
        )
        #expect(started.code == 0, "\(started.all)")
        let served = try await Served(lab, ["web1", "db"])

        let list = try await Tool.run(["nbdinfo", "--list", served.uri("")])
        #expect(
            list.code == 0 && list.output.contains("web1/virtio0") && list.output.contains("db/data"),
            "\(list.all)"
        )
        let info = try await Tool.run(["nbdinfo", served.uri("db/data")])
        #expect(info.output.contains("is_read_only: true") && info.output.contains("48M"), "\(info.all)")
        // The live view shows what the guest writes.
        try await guestWrites(lab, "write -P 7 3M 64k")
        let copy = lab.directory.file("copy.raw")
        _ = try await shell("nbdcopy '\(served.uri("web1/virtio0"))' \(copy)")
        let digests = try await Tool.run([
            Lab.crossdock, "nbd", "info", "--digest", "--json", served.uri("web1/virtio0"),
        ])
        let copied = try ChunkDigests.digest(of: copy)
        #expect(digests.code == 0 && digests.output.contains(copied), "\(digests.all)")
        let compared = try await shell("qemu-io -r -f raw -c 'read -P 7 3M 64k' \(copy)")
        #expect(!compared.contains("verification failed"))
        // Nothing but TLS, and nobody without a certificate.
        let clear = try await Tool.run(["nbdinfo", "nbd://localhost:\(served.port)/web1/virtio0"])
        #expect(clear.code != 0)
        let strangers = try TestPKI()
        let stranger = try await Tool.run(["nbdinfo", served.uri("web1/virtio0", pki: strangers.directory)])
        #expect(stranger.code != 0)
        // A client that stops in the middle does not stop the guest or the next client.
        let stuck = try ChildProcess([
            "sh", "-c",
            "nbdcopy --connections=1 '\(served.uri("web1/virtio0"))' - | { head -c 70000; echo; echo STUCK; sleep 600; }",
        ])
        try await eventually("a client stands still") { stuck.output.contains("STUCK") }
        try await guestWrites(lab, "write -P 8 4M 64k")
        #expect(try await Tool.run(["nbdinfo", served.uri("db/data")]).code == 0)
        let written = try await shell("qemu-io -U -r -f raw -c 'read -P 8 4M 64k' \(first)")
        #expect(!written.contains("verification failed"), "\(written)")
        // A migration would leave the readers behind.
        try await lab.startDestination()
        let refused = try await lab.migrate()
        #expect(
            refused.code == MigrationError.Code.busy.rawValue && refused.errors.contains("exported"),
            "\(refused.all)"
        )

        let ended = try await served.stop()
        #expect(ended.code == 0, "\(ended.all)")
        for guest in ["web1", "db"] {
            #expect(try await nodesLeft(lab, guest: guest) == [])
            #expect(try await lab.monitor("a", guest) { try await $0.status() } == "running")
        }
        let moved = try await lab.migrate()
        #expect(moved.code == 0, "\(moved.all)")
    }

    @Test func clientsWriteOnlyWhereTheyWereLetAndTheDeviceShares() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        let new = try await lab.makeImage("new.raw", megabytes: 16, data: 3)
        let device = ["-drive", "file=\(disk),format=raw,if=none,id=one", "-device"]
        try await lab.startIdleGuest(disks: [], more: device + ["virtio-blk-pci,drive=one,share-rw=on"])
        let reading = try await Served(lab, ["web1"])
        let refused = try await Tool.run([Lab.crossdock, "nbd", "copy", new, reading.uri("web1/one")])
        #expect(refused.code != 0, "\(refused.all)")
        #expect(try await reading.stop().code == 0)
        let writing = try await Served(lab, ["web1"], ["--writable"])
        _ = try await shell("\(Lab.crossdock) nbd copy \(new) '\(writing.uri("web1/one"))'")
        #expect(try await writing.stop().code == 0)
        let (there, here) = (try ChunkDigests.digest(of: disk), try ChunkDigests.digest(of: new))
        #expect(there == here)
    }

    @Test func eachExportHasItsOwnReaders() async throws {
        let lab = try Lab()
        let disks = [
            try await lab.makeImage("first.raw", megabytes: 16, data: 1),
            try await lab.makeImage("second.raw", megabytes: 16, data: 1),
        ]
        try await lab.startIdleGuest(disks: disks)
        let backup = try lab.pki.issue("backup", hosts: ["backup"])
        let rules = [
            "--object", "authz-simple,id=b,identity=CN=backup", "--tls-authz", "web1/virtio1=b",
            "--object", "authz-simple,id=a,identity=CN=host", "--tls-authz", "web1=a",
        ]
        let served = try await Served(lab, ["web1"], rules)
        func reads(_ export: String, _ pki: String) async throws -> Bool {
            try await Tool.run(["nbdinfo", "--size", served.uri(export, pki: pki)]).code == 0
        }
        #expect(try await reads("web1/virtio1", backup))
        #expect(try await reads("web1/virtio0", backup) == false)
        #expect(try await reads("web1/virtio0", lab.pki.directory))
        #expect(try await reads("web1/virtio1", lab.pki.directory) == false)
        _ = try await served.stop()
    }

    @Test(arguments: ["nbdcopy", "crossdock"])
    func incrementalBackupsTakeOnlyWhatChanged(_ tool: String) async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 8)
        try await lab.startIdleGuest(disks: [disk])
        let backup = lab.directory.file("backup.raw")
        func copy(_ served: Served) async throws {
            _ = try await shell(
                tool == "nbdcopy"
                    ? "nbdcopy '\(served.uri("web1/virtio0"))' \(backup)"
                    : "\(Lab.crossdock) nbd copy '\(served.uri("web1/virtio0"))' \(backup)"
            )
        }
        /// What the guest had when the snapshot was taken, by reading the image itself afterwards.
        func expectEqual(_ served: Served, _ path: String) async throws {
            let digest = try await Tool.run([
                Lab.crossdock, "nbd", "info", "--digest", "--json", served.uri("web1/virtio0"),
            ])
            let expected = try ChunkDigests.digest(of: path)
            #expect(digest.output.contains(expected), "\(digest.all)")
        }

        // The first backup is whole; what the guest writes meanwhile is not in it.
        let first = try await Served(lab, ["web1"], ["--snapshot"])
        let mark = first.bitmap
        #expect(mark.hasPrefix("crossdock-"), "\(first.process.output)")
        try await guestWrites(lab, "write -P 17 1M 64k")
        try await copy(first)
        try await expectEqual(first, backup)
        #expect(
            try await shell("qemu-io -r -f raw -c 'read -P 17 1M 64k' \(backup) || true").contains(
                "verification failed"
            )
        )
        #expect(try await first.stop().code == 0)
        #expect(try await nodesLeft(lab) == [])

        // Two increments: what the context says has changed is all that is copied.
        try await guestWrites(lab, "write -P 18 5M 128k")
        for round in 0..<2 {
            let next = try await Served(lab, ["web1"], ["--snapshot"])
            let context = "qemu:dirty-bitmap:\(mark)"
            let map = try await Tool.run(["nbdinfo", "--json", "--map=\(context)", next.uri("web1/virtio0")])
            #expect(map.code == 0, "\(map.all)")
            let dirty = try JSONValue(parsing: Array(map.output.utf8)).array.filter { $0["type"]?.integer == 1 }
            let bytes = dirty.reduce(0) { $0 + ($1["length"]?.integer ?? 0) }
            // Written before the first backup was read, and after it; in the second round also what came in between.
            #expect(bytes == (round == 0 ? 192 : 256) << 10, "\(map.output)")
            if tool == "crossdock" {
                let done = try await shell(
                    "\(Lab.crossdock) nbd copy --json --bitmap \(mark) --verify '\(next.uri("web1/virtio0"))' \(backup)"
                )
                #expect(done.contains("\"read\": \(bytes)") && done.contains("\"verified\": true"), "\(done)")
            } else {
                for extent in dirty {
                    let (offset, length) = (extent["offset"]?.integer ?? 0, extent["length"]?.integer ?? 0)
                    _ = try await shell(
                        """
                        nbdcopy -- [ nbdkit --exit-with-parent --filter=offset nbd hostname=localhost port=\(next.port) \
                            export=web1/virtio0 tls=require tls-certificates=\(lab.pki.directory) offset=\(offset) range=\(length) ] \(backup).part
                        dd if=\(backup).part of=\(backup) bs=65536 seek=\(offset / 65536) conv=notrunc status=none
                        """
                    )
                }
            }
            try await expectEqual(next, backup)
            // A second reader sees the same moment, whatever the guest does.
            try await guestWrites(lab, "write -P \(30 + round) \(20 + round)M 64k")
            try await expectEqual(next, backup)
            #expect(try await next.stop().code == 0)
        }
        let bitmaps = try await lab.monitor("a") { try await $0.disks().first?.bitmaps ?? [] }
        #expect(bitmaps.count == 3, "\(bitmaps)")
    }

    /// Room for less than the guest overwrites.
    @Test func aFullScratchFileBreaksTheSnapshotAndNeverTheGuest() async throws {
        let lab = try Lab()
        let scratch = lab.directory.directory("scratch")
        try await lab.mount("mount -t tmpfs -o size=1M none \(scratch)")
        let disk = try await lab.makeImage("disk.raw", megabytes: 32, data: 16)
        try await lab.startIdleGuest(disks: [disk])
        let served = try await Served(lab, ["web1"], ["--snapshot", "--scratch-dir", scratch])
        #expect(try await Tool.run(["nbdinfo", "--size", served.uri("web1/virtio0")]).code == 0)
        for offset in 16..<24 { try await guestWrites(lab, "write -P 5 \(offset)M 1M") }
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
        let broken = try await Tool.run(["nbdcopy", served.uri("web1/virtio0"), lab.directory.file("copy.raw")])
        #expect(broken.code != 0, "a broken snapshot must not look like a good one")
        let ours = try await lab.crossdock(["nbd", "copy", served.uri("web1/virtio0"), lab.directory.file("ours.raw")])
        #expect(ours.code == 1 && !ours.errors.contains("not made"), "\(ours.all)")
        #expect(ours.errors.contains("The snapshot of 'virtio0' of guest 'web1' has broken"), "\(ours.all)")
        #expect(ours.errors.contains("its scratch directory is full"), "\(ours.all)")
        #expect(try await served.stop().code == 0)
        #expect(try await nodesLeft(lab) == [])
        try await guestWrites(lab, "write -P 6 25M 1M")
        let read = try await shell("qemu-io -U -r -f raw -c 'read -P 5 16M 8M' -c 'read -P 6 25M 1M' \(disk)")
        #expect(!read.contains("verification failed"), "\(read)")
    }

    @Test func anExportThatIsKilledLeavesAGuestThatWritesAndCanBeCleanedUp() async throws {
        let lab = try Lab()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 32, data: 4)])
        let served = try await Served(lab, ["web1"], ["--snapshot"])
        served.process.signal(SIGKILL)
        _ = try await served.process.finish()
        try await guestWrites(lab, "write -P 5 17M 1M")
        #expect(try await nodesLeft(lab) != [])
        // The next export begins with cleaning up, and so does a migration.
        let next = try await Served(lab, ["web1"], ["--snapshot"])
        #expect(try await Tool.run(["nbdinfo", "--size", next.uri("web1/virtio0")]).code == 0)
        next.process.signal(SIGKILL)
        _ = try await next.process.finish()
        try await lab.startDestination()
        let moved = try await lab.migrate()
        #expect(moved.code == 0, "\(moved.all)")
        #expect(DurableFile.list("\(lab.state("a"))/scratch").isEmpty)
    }

    /// QEMU waits for the replies of a drained export to be read, by whoever reads them on its host.
    @Test func anExportThatStandsStillIsEndedBeforeItHoldsUpTheGuest() async throws {
        let lab = try Lab()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 512, data: 200)])
        let served = try await Served(lab, ["web1"])
        let reader = try ChildProcess(["nbdcopy", "--requests=64", served.uri("web1/virtio0"), "null:"])
        try await eventually("the reader reads") {
            try await lab.monitor("a") { monitor in
                try await !monitor.blockExports().isEmpty
            }
        }
        served.process.signal(SIGSTOP)
        // However long QEMU waits, it is not longer than the watchdog does.
        try await lab.monitor("a") { monitor in
            try await monitor.execute("stop", timeout: .seconds(60))
            try await monitor.resume()
        }
        try await eventually(seconds: 60, "the export has ended") { !served.process.isRunning }
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
        reader.signal(SIGKILL)
    }

    @Test func theUsersOwnNBDServerIsLeftAlone() async throws {
        let lab = try Lab()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 1)])
        let socket = lab.directory.file("users.sock")
        _ = try await lab.monitor("a") { monitor in
            try await monitor.startNBDServer(socket: socket, connections: 1)
            let node = try await monitor.disks()[0].node
            try await monitor.addNBDExport("users", node: node, name: "users", isWritable: false)
        }
        let refused = try await lab.crossdock(
            ["export", "web1", "--listen", "localhost:0", "--state-dir", lab.state("a")] + lab.credentials(),
            seconds: 30
        )
        #expect(refused.code == 10 && refused.errors.contains("it was left alone"), "\(refused.all)")
        #expect(try await nodesLeft(lab) == ["users"])
        #expect(try await Tool.run(["nbdinfo", "--size", "nbd+unix:///users?socket=\(socket)"]).code == 0)
        try await lab.startDestination()
        let blocked = try await lab.migrate()
        #expect(blocked.code == 10 && blocked.errors.contains("exported as 'users'"), "\(blocked.all)")
        #expect(try await nodesLeft(lab) == ["users"])
    }

    @Test func whatCannotBeExportedIsSaidClearly() async throws {
        let lab = try Lab()
        func export(_ arguments: [String]) async throws -> ToolResult {
            try await lab.crossdock(
                ["export"] + arguments + ["--listen", "localhost:0", "--state-dir", lab.state("a")] + lab.credentials(),
                seconds: 30
            )
        }
        let unknown = try await export(["web9"])
        #expect(unknown.code == 10 && unknown.errors.contains("no guest 'web9'"), "\(unknown.all)")
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 1)])
        let missing = try await export(["web1", "--disk", "system"])
        #expect(missing.code == 10 && missing.errors.contains("no disk 'system'; it has virtio0"), "\(missing.all)")
        #expect(try await nodesLeft(lab) == [])
        let stopped = try await lab.crossdock(["guest", "stop", "web1", "--force", "--state-dir", lab.state("a")])
        #expect(stopped.code == 0)
        let gone = try await export(["web1"])
        #expect(gone.code == 10 && gone.errors.contains("does not run"), "\(gone.all)")
    }

    @Test func anExportEndsWithItsGuest() async throws {
        let lab = try Lab()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 1)])
        let served = try await Served(lab, ["web1"], ["--snapshot"])
        _ = try await lab.crossdock(["guest", "stop", "web1", "--force", "--state-dir", lab.state("a")])
        let ended = try await served.process.finish(seconds: 30)
        #expect(ended.code == 0 && ended.all.contains("Every guest has ended (web1)"), "\(ended.all)")
        #expect(DurableFile.list("\(lab.state("a"))/scratch").isEmpty)
    }

    @Test func aSnapshotHasAllDisks() async throws {
        let lab = try Lab()
        let images = [
            try await lab.makeImage("first.raw", megabytes: 16, data: 1),
            try await lab.makeImage("second.raw", megabytes: 16, data: 1),
        ]
        let command = [
            "qemu-system-x86_64", "-machine", "q35,accel=tcg", "-m", "64", "-nodefaults", "-display", "none",
            "-drive", "file=\(images[0]),format=raw,if=none,id=one", "-device", "virtio-blk-pci,drive=one",
            "-drive", "file=\(images[1]),format=raw,if=none,id=two",
            "-device", "virtio-scsi-pci,id=s0", "-device", "scsi-hd,drive=two,bus=s0.0",
        ]
        let started = try await lab.crossdock(
            ["guest", "start", "web1", "--state-dir", lab.state("a"), "--"] + command
        )
        #expect(started.code == 0, "\(started.all)")
        for drive in ["one", "two"] { try await guestWrites(lab, "write -P 1 8M 64k", drive: drive) }
        let served = try await Served(lab, ["web1"], ["--snapshot"])
        for drive in ["one", "two"] { try await guestWrites(lab, "write -P 2 8M 64k", drive: drive) }
        for export in ["web1/one", "web1/two"] {
            let copy = lab.directory.file("copy.raw")
            _ = try await shell("nbdcopy '\(served.uri(export))' \(copy)")
            let read = try await shell("qemu-io -r -f raw -c 'read -P 1 8M 64k' \(copy)")
            #expect(!read.contains("verification failed"), "\(export): \(read)")
        }
        let ended = try await served.stop()
        #expect(ended.code == 0, "\(ended.all)")
        #expect(try await nodesLeft(lab) == [])
        for image in images {
            let read = try await shell("qemu-io -U -r -f raw -c 'read -P 2 8M 64k' \(image)")
            #expect(!read.contains("verification failed"), "\(image): \(read)")
        }
    }

    /// QEMU before 9.1 ends itself when a client leaves the export of such a disk.
    @Test(arguments: ["virtio-blk", "virtio-scsi"])
    func aDiskOfAnIOThreadIsRefusedWhereQEMUWouldAbort(_ kind: String) async throws {
        let lab = try Lab()
        let image = try await lab.makeImage("first.raw", megabytes: 16, data: 1)
        let device =
            kind == "virtio-blk"
            ? ["-device", "virtio-blk-pci,drive=one,iothread=io0,id=d"]
            : ["-device", "virtio-scsi-pci,id=s0,iothread=io0", "-device", "scsi-hd,drive=one,bus=s0.0"]
        let command = [
            "qemu-system-x86_64", "-machine", "q35,accel=tcg", "-m", "64", "-nodefaults", "-display", "none",
            "-object", "iothread,id=io0", "-drive", "file=\(image),format=raw,if=none,id=one",
        ]
        let started = try await lab.crossdock(
            ["guest", "start", "web1", "--state-dir", lab.state("a"), "--"] + command + device
        )
        #expect(started.code == 0, "\(started.all)")
        let version = try await lab.monitor("a") { monitor in
            (monitor.version, monitor.isAtLeast(9, 1))
        }
        if version.1 {
            for more in [[], ["--snapshot"]] {
                let served = try await Served(lab, ["web1"], more)
                let digest = try await Tool.run([
                    Lab.crossdock, "nbd", "info", "--digest", "--json", served.uri("web1/one"),
                ])
                #expect(digest.code == 0, "QEMU \(version.0): \(digest.all)")
                #expect(try await served.stop().code == 0)
                #expect(try await lab.monitor("a") { try await $0.status() } == "running")
            }
            #expect(try await nodesLeft(lab) == [])
            return
        }
        for more in [[], ["--snapshot"]] {
            let refused = try await lab.crossdock(
                ["export", "web1", "--listen", "localhost:0", "--state-dir", lab.state("a")] + lab.credentials() + more,
                seconds: 30
            )
            #expect(refused.code == 10 && refused.errors.contains("I/O thread io0"), "\(refused.all)")
        }
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
        #expect(try await nodesLeft(lab) == [])
    }

    @Test func anImageThatWasPutOnTopMeanwhileStaysTheGuests() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest(disks: [disk])
        let served = try await Served(lab, ["web1"], ["--snapshot"])
        let overlay = lab.directory.file("overlay.qcow2")
        _ = try await lab.monitor("a") { monitor in
            let node = try await monitor.disks()[0].node
            try await monitor.execute(
                "blockdev-snapshot-sync",
                ["node-name": .string(node), "snapshot-file": .string(overlay), "snapshot-node-name": "overlay"]
            )
        }
        try await guestWrites(lab, "write -P 77 3M 64k")
        #expect(try await served.stop().code == 0)
        #expect(try await nodesLeft(lab) == [])
        #expect(try await lab.monitor("a") { try await $0.disks() }.first?.node == "overlay")
        let read = try await shell("qemu-io -U -r -f qcow2 -c 'read -P 77 3M 64k' \(overlay)")
        #expect(!read.contains("verification failed"), "\(read)")
    }

    /// QEMU aborts when a bitmap that is exported would have to be resized.
    @Test func aDiskThatIsResizedWhileAnIncrementIsExportedEndsNoGuest() async throws {
        let lab = try Lab()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 32, data: 2)])
        #expect(try await Served(lab, ["web1"], ["--snapshot"]).stop().code == 0)
        try await guestWrites(lab, "write -P 7 1M 64k")
        let increment = try await Served(lab, ["web1"], ["--snapshot"])
        _ = try await lab.monitor("a") { monitor in
            try await monitor.execute("block_resize", ["device": "virtio0", "size": .integer(48 << 20)])
        }
        let info = try await Tool.run([Lab.crossdock, "nbd", "info", "--json", increment.uri("web1/virtio0")])
        #expect(info.code == 0 && info.output.contains("\(32 << 20)"), "\(info.all)")
        #expect(try await increment.stop().code == 0)
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
        #expect(try await nodesLeft(lab) == [])
        // What came since is still known.
        let next = try await Served(lab, ["web1"], ["--snapshot"])
        #expect(try await next.stop().code == 0)
    }

    @Test func incrementsSurviveAnExportThatWasKilled() async throws {
        let lab = try Lab()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 32, data: 2)])
        let first = try await Served(lab, ["web1"], ["--snapshot"])
        let (mark, backup) = (first.bitmap, lab.directory.file("backup.raw"))
        _ = try await shell("nbdcopy '\(first.uri("web1/virtio0"))' \(backup)")
        #expect(try await first.stop().code == 0)
        for offset in [1, 2] {
            try await guestWrites(lab, "write -P \(offset) \(offset)M 64k")
            let killed = try await Served(lab, ["web1"], ["--snapshot"])
            killed.process.signal(SIGKILL)
            _ = try await killed.process.finish()
        }
        try await guestWrites(lab, "write -P 3 3M 64k")
        let last = try await Served(lab, ["web1"], ["--snapshot"])
        let done = try await shell(
            "\(Lab.crossdock) nbd copy --json --bitmap \(mark) --verify '\(last.uri("web1/virtio0"))' \(backup)"
        )
        #expect(done.contains("\"read\": \(192 << 10)") && done.contains("\"verified\": true"), "\(done)")
        let lost = try await Tool.run([
            Lab.crossdock, "nbd", "copy", "--bitmap", "crossdock-never", last.uri("web1/virtio0"), backup,
        ])
        #expect(lost.code != 0 && lost.errors.contains("does not offer the dirty bitmap"), "\(lost.all)")
        #expect(try await last.stop().code == 0)
    }

    // MARK: the guest agent

    /// A Linux guest with a file system and the guest agent, which appends lines and makes each durable.
    private func startAgentGuest(_ lab: Lab) async throws -> String {
        let disk = lab.directory.file("disk.raw")
        _ = try await shell("truncate -s 64M \(disk)")
        let command = [
            "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-display",
            "none",
            "-kernel", "\(Lab.guestFiles)/vmlinuz", "-initrd", "\(Lab.guestFiles)/initrd-agent", "-append",
            "console=ttyS0 quiet no_timer_check",
            "-drive", "file=\(disk),format=raw,if=virtio", "-serial", "file:\(lab.consoleA)", "-device",
            "virtio-serial-pci",
            "-chardev", "socket,id=agent0,path=\(lab.directory.file("agent.sock")),server=on,wait=off",
            "-device", "virtserialport,chardev=agent0,name=org.qemu.guest_agent.0",
        ]
        let started = try await lab.crossdock(
            ["guest", "start", "web1", "--state-dir", lab.state("a"), "--"] + command
        )
        guard started.code == 0 else { throw TestFailure(started.all) }
        try await eventually(seconds: 90, "the guest writes") { try self.lines(lab) > 5 }
        // The agent opens its port a moment after that.
        try await eventually(seconds: 60, "the guest agent is there") {
            try await lab.monitor("a") { try await $0.guestAgentSocket() } != nil
        }
        return disk
    }

    /// How many lines the guest has made durable.
    private func lines(_ lab: Lab) throws -> Int {
        let text = String(decoding: try DurableFile.read(lab.consoleA) ?? [], as: UTF8.self)
        return text.split(whereSeparator: \.isNewline).last { $0.hasPrefix("WROTE ") && $0.count > 6 }
            .flatMap { Int($0.dropFirst(6)) } ?? 0
    }

    @Test func aSnapshotFreezesTheFileSystemsThroughTheGuestAgent() async throws {
        let lab = try Lab()
        _ = try await startAgentGuest(lab)
        let before = try lines(lab)
        let served = try await Served(lab, ["web1"], ["--snapshot"])
        #expect(
            served.process.output.contains("1 file systems frozen"),
            "\(served.process.output)\(served.process.errors)"
        )
        let after = try lines(lab)
        try await eventually("the guest goes on") { try self.lines(lab) > after + 3 }
        let copy = lab.directory.file("copy.raw")
        _ = try await shell("nbdcopy '\(served.uri("web1/virtio0"))' \(copy)")
        // A file system without a journal is only in order when nothing was under way.
        let checked = try await Tool.run(["e2fsck", "-fn", copy])
        #expect(checked.code == 0, "\(checked.all)")
        let saved = try await shell("debugfs -R 'cat lines' \(copy) 2>/dev/null")
        let kept = saved.split(separator: "\n").count
        #expect(kept >= before && saved.contains("LINE \(before)\n"), "\(before) \(kept)")
        _ = try await served.stop()
    }

    /// Whoever froze is gone or stuck: the guest must not stay frozen.
    @Test(arguments: ["time", "death"])
    func aFrozenGuestIsThawedByTheWatchdog(_ cause: String) async throws {
        let lab = try Lab()
        _ = try await startAgentGuest(lab)
        let socket = lab.directory.file("agent.sock")
        let holder = try ChildProcess(["sleep", "600"])
        let loop = lab.loop
        let watchdog = try ChildProcess([
            Lab.crossdock, "snapshot-watchdog", "--agent", socket, "--parent", "\(holder.pid)",
            "--seconds", cause == "time" ? "2" : "600",
        ])
        defer { watchdog.signal(SIGKILL) }
        let frozen = try await loop.run {
            let agent = try await GuestAgent.connect(to: socket, on: loop)
            defer { agent.close() }
            return try await agent.freeze()
        }
        #expect(frozen == 1)
        let stopped = try lines(lab)
        if cause == "death" { holder.signal(SIGKILL) }
        try await eventually(seconds: 30, "the guest writes again") { try self.lines(lab) > stopped + 3 }
        // Whoever was stuck would be in the way.
        if cause == "time" { try await eventually("the holder has ended") { !holder.isRunning } }
    }

    /// The moment in which the processors stand still is short, and a killed export must not make it long.
    @Test func aPausedGuestIsResumedByTheWatchdogWhenTheExportDies() async throws {
        let lab = try Lab()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 1)])
        let holder = try ChildProcess(["sleep", "600"])
        let path = lab.guests("a").agentMonitor(of: "web1")
        let watchdog = try ChildProcess([
            Lab.crossdock, "snapshot-watchdog", "--monitor", path, "--parent", "\(holder.pid)", "--seconds", "600",
        ])
        defer { watchdog.signal(SIGKILL) }
        try await lab.monitor("a") { try await $0.pause() }
        #expect(try await lab.monitor("a") { try await $0.status() } == "paused")
        holder.signal(SIGKILL)
        try await eventually("the guest runs") { try await lab.monitor("a") { try await $0.status() } == "running" }
    }
}
