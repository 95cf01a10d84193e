import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// QEMU processes that something else started.
@Suite(.serialized, .timeLimit(.minutes(15)))
struct AdoptionEndToEnd {
    static let firmware = "/usr/share/OVMF"

    /// Everything that a command line written over years has.
    private func longCommand(_ lab: Lab) async throws -> [String] {
        let system = try await lab.makeImage("system.raw", megabytes: 64, data: 4)
        let plain = try await lab.makeImage("plain.raw", megabytes: 32, data: 2)
        let base = lab.directory.file("base.qcow2")
        let data = lab.directory.file("data.qcow2")
        let variables = lab.directory.file("vars.fd")
        let script = """
            qemu-img create -q -f qcow2 \(base) 48M && qemu-io -c 'write -P 7 1M 2M' \(base) >/dev/null
            qemu-img create -q -f qcow2 -b \(base) -F qcow2 \(data) && qemu-io -c 'write -P 9 8M 1M' \(data) >/dev/null
            cp \(Self.firmware)/OVMF_VARS_4M.fd \(variables)
            """
        let made = try await Tool.run(["sh", "-ec", script])
        guard made.code == 0 else { throw TestFailure(made.all) }
        let config = lab.directory.file("more.cfg")
        try DurableFile.write(Array("[device \"rng0\"]\n  driver = \"virtio-rng-pci\"\n".utf8), to: config)
        return [
            "-name", "guest=web1,debug-threads=on", "-machine", "q35,accel=tcg", "-cpu", "max", "-m",
            "256,slots=2,maxmem=1G",
            "-smp", "2,maxcpus=4", "-nodefaults", "-uuid", "3f8f7c2e-4d55-4a1c-9c35-9b0b3d0f7a11", "-readconfig",
            config,
            "-object", "memory-backend-file,id=ram0,size=256M,mem-path=\(lab.directory.file("memory")),share=on",
            "-machine", "memory-backend=ram0",
            "-drive", "if=pflash,format=raw,unit=0,readonly=on,file=\(Self.firmware)/OVMF_CODE_4M.fd",
            "-drive", "if=pflash,format=raw,unit=1,file=\(variables)", "-object", "iothread,id=io0",
            "-blockdev", "driver=file,filename=\(system),node-name=file0,cache.direct=off",
            "-blockdev", #"{"driver":"raw","file":"file0","node-name":"system"}"#,
            "-device", "virtio-blk-pci,drive=system,iothread=io0,id=disk-system,bootindex=1",
            "-device", "virtio-scsi-pci,id=scsi0", "-drive", "file=\(data),if=none,id=data,format=qcow2",
            "-device", "scsi-hd,drive=data,bus=scsi0.0", "-drive", "file=\(plain),format=raw,if=virtio",
            "-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0",
            "-chardev", "socket,id=serial0,path=\(lab.directory.file("serial.sock")),server=on,wait=off",
            "-serial", "chardev:serial0", "-device", "pcie-root-port,id=port0,slot=1", "-vnc", "127.0.0.1:41,to=90",
            "-device", "VGA", "-device", "virtio-serial-pci",
            "-chardev", "socket,path=\(lab.directory.file("agent.sock")),server=on,wait=off,id=agent0",
            "-device", "virtserialport,chardev=agent0,name=org.qemu.guest_agent.0",
            "-pidfile", lab.directory.file("pid"), "-monitor",
            "unix:\(lab.directory.file("hmp.sock")),server=on,wait=off",
        ]
    }

    @Test func limitsThatWereSetAtRunTimeMove() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        let limited = try await lab.makeImage("limited.raw", megabytes: 16, data: 1)
        try await lab.startIdleGuest(
            disks: [disk],
            more: [
                "-object", "throttle-group,id=tg,x-iops-total=1000,x-bps-read=900000", "-drive",
                "file=\(limited),format=raw,if=virtio,id=dd,throttling.iops-total=500,throttling.iops-total-max=800",
            ]
        )
        try await lab.startDestination()
        _ = try await lab.monitor("a") { monitor in
            for (drive, limit) in [("virtio0", 70), ("dd", 50)] {
                var limits: [String: JSONValue] = ["device": .string(drive), "iops": .integer(Int64(limit))]
                for key in ["bps", "bps_rd", "bps_wr", "iops_rd", "iops_wr"] { limits[key] = 0 }
                try await monitor.execute("block_set_io_throttle", .object(limits))
            }
            try await monitor.execute(
                "qom-set",
                ["path": "/objects/tg", "property": "limits", "value": ["iops-total": 77, "bps-read": 0]]
            )
        }
        let moved = try await lab.migrate()
        #expect(moved.code == 0, "\(moved.all)")
        let there = try await lab.monitor("b") { monitor in
            let drives = try await monitor.execute("query-block").array
            let group = try await monitor.execute("qom-get", ["path": "/objects/tg", "property": "limits"])
            return (drives, group)
        }
        let iops = Dictionary(
            uniqueKeysWithValues: there.0.map { ($0["device"]?.string ?? "", $0["inserted"]?["iops"]?.integer) }
        )
        #expect(iops["virtio0"] == 70 && iops["dd"] == 50, "\(there.0)")
        #expect(there.0.allSatisfy { $0["inserted"]?["iops_max"]?.integer ?? 0 == 0 }, "\(there.0)")
        #expect(there.1["iops-total"]?.integer == 77 && there.1["bps-read"]?.integer == 0, "\(there.1)")
    }

    @Test func aLongCommandLineWithAHotPluggedDiskMovesThereAndBack() async throws {
        let lab = try Lab()
        let guest = try await lab.startForeignGuest(try await longCommand(lab))
        let plugged = try await lab.makeImage("plugged.raw", megabytes: 16, data: 1)
        _ = try await lab.foreignMonitor { monitor in
            try await monitor.execute(
                "blockdev-add",
                ["driver": "raw", "node-name": "plugged", "file": ["driver": "file", "filename": .string(plugged)]]
            )
            try await monitor.execute(
                "device_add",
                ["driver": "virtio-blk-pci", "drive": "plugged", "id": "disk-plugged", "bus": "port0", "serial": "hot"]
            )
        }
        let socket = lab.directory.file("foreign.sock")
        let adopted = try await lab.crossdock([
            "guest", "adopt", "web1", "--qmp", socket, "--state-dir", lab.state("a"),
        ])
        #expect(adopted.code == 0 && adopted.output.contains("process \(guest.pid)"), "\(adopted.all)")
        #expect(!adopted.errors.contains("cannot be migrated"), "\(adopted.all)")

        let shown = try await lab.crossdock(["guest", "show", "web1", "--json", "--state-dir", lab.state("a")])
        let view = try JSONValue(parsing: Array(shown.output.utf8))
        #expect(
            view["state"]?.string == "running" && view["machine"]?.string?.hasPrefix("pc-q35-") == true,
            "\(shown.all)"
        )
        #expect(view["migratable"]?.bool == true && view["blockers"]?.array == [], "\(shown.all)")
        let disks = view["disks"]?.array ?? []
        let names = Set(disks.compactMap { $0["name"]?.string })
        #expect(names == ["pflash0", "pflash1", "disk-system", "data", "virtio0", "disk-plugged"])
        let data = disks.first { $0["name"]?.string == "data" }
        #expect(
            data?["format"]?.string == "qcow2" && data?["backing"]?.array == [.string(lab.directory.file("base.qcow2"))]
        )
        #expect(data?["allocated"]?.integer.map { $0 > 1 << 20 && $0 < 4 << 20 } == true)

        let before = try await lab.fingerprint("foreign.sock")
        let untouched = try lab.snapshot()
        try await lab.startDestination()
        let rehearsal = try await lab.migrate(more: ["--dry-run"])
        #expect(rehearsal.code == 0 && rehearsal.output.contains("can move to localhost"), "\(rehearsal.all)")
        #expect(rehearsal.output.contains("-pidfile") && rehearsal.output.contains("left out"), "\(rehearsal.all)")
        let after = try lab.snapshot()
        for (name, text) in untouched { #expect(after[name] == text, "\(name)") }
        #expect(after.count == untouched.count)
        #expect(try lab.leftAtDestination() == [])

        let report = lab.directory.file("report.json")
        let there = try await lab.migrate(more: ["--report", report])
        #expect(there.code == 0, "\(there.all)")
        #expect(try lab.report(report).disks.count == 5)
        #expect(
            try lab.report(report).disks.allSatisfy {
                $0.digestSource == $0.digestDestination && $0.digestSource != nil
            }
        )
        // It was ended while it stood still, so that nobody could have it go on.
        _ = try await guest.finish()
        #expect(try await lab.identity("b").differences(from: before) == [])

        try await lab.startDestination("a")
        let back = try await lab.migrate(from: "b", more: ["--report", report])
        #expect(back.code == 0, "\(back.all)")
        #expect(
            try lab.report(report).disks.allSatisfy {
                $0.digestSource == $0.digestDestination && $0.digestSource != nil
            }
        )
        #expect(try await lab.identity("a").differences(from: before) == [])
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
    }

    @Test func whatQEMUDoesNotMigrateIsAdoptedAndNamed() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        let saved = lab.directory.file("saved.qcow2")
        let made = try await Tool.run(
            ["sh", "-ec", "qemu-img create -q -f qcow2 \(saved) 16M; qemu-img snapshot -c before \(saved)"]
        )
        #expect(made.code == 0)
        _ = try await lab.startForeignGuest([
            "-machine", "q35,accel=tcg", "-m", "64", "-nodefaults", "-drive", "file=\(disk),format=raw,if=none,id=d0",
            "-device", "virtio-blk-pci,drive=d0", "-device", "qemu-xhci,id=x0", "-device", "usb-uas,bus=x0.0", "-drive",
            "file=\(saved),format=qcow2,if=virtio",
        ])
        let socket = lab.directory.file("foreign.sock")
        let adopted = try await lab.crossdock([
            "guest", "adopt", "web1", "--qmp", socket, "--state-dir", lab.state("a"),
        ])
        #expect(adopted.code == 0, "\(adopted.all)")
        #expect(
            adopted.errors.contains("usb-uas") && adopted.errors.contains("internal snapshots (before)"),
            "\(adopted.all)"
        )
        try await lab.startDestination()
        let refused = try await lab.migrate()
        #expect(refused.code == MigrationError.Code.guest.rawValue, "\(refused.all)")
        #expect(refused.errors.contains("usb-uas") && refused.errors.contains("internal snapshots"), "\(refused.all)")
        #expect(try await lab.foreignMonitor { try await $0.status() } == "running")
        #expect(try lab.leftAtDestination() == [])
    }

    @Test func aJobOfTheUserIsInTheWayAndLeftAlone() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 32)
        _ = try await lab.startForeignGuest([
            "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-drive", "file=\(disk),format=raw,if=virtio",
        ])
        let copy = lab.directory.file("copy.raw")
        _ = try await lab.foreignMonitor { monitor in
            try await monitor.execute(
                "drive-backup",
                [
                    "job-id": "nightly", "device": "virtio0", "sync": "full", "target": .string(copy), "format": "raw",
                    "speed": 1024,
                ]
            )
        }
        try await lab.startDestination()
        let refused = try await lab.migrate(more: ["--qmp", lab.directory.file("foreign.sock")])
        #expect(refused.code == 10 && refused.errors.contains("'nightly' (backup)"), "\(refused.all)")
        let jobs = try await lab.foreignMonitor {
            try await $0.execute("query-jobs").array.compactMap { $0["id"]?.string }
        }
        #expect(jobs == ["nightly"])
    }

    @Test func aMonitorThatSomebodyHoldsIsReplacedByAnotherOne() async throws {
        let lab = try Lab()
        let second = lab.directory.file("second.sock")
        let base = ["-machine", "pc,accel=tcg", "-m", "64", "-nodefaults"]
        _ = try await lab.startForeignGuest(
            base + ["-chardev", "socket,id=m2,path=\(second),server=on,wait=off", "-mon", "chardev=m2,mode=control"]
        )
        let state = lab.state("a")
        let socket = lab.directory.file("foreign.sock")
        let result = try await lab.foreignMonitor { _ in
            try await lab.crossdock(["guest", "adopt", "web1", "--qmp", socket, "--state-dir", state])
        }
        #expect(result.code == 0 && result.errors.contains("\(second) is used instead"), "\(result.all)")

        // With both held the guest is known, and what is in the way is said.
        let both = try await lab.foreignMonitor { _ in
            try await lab.foreignMonitor("second.sock") { _ in
                try await lab.crossdock(["guest", "adopt", "web1", "--qmp", socket, "--state-dir", state])
            }
        }
        #expect(both.code == 0 && both.errors.contains("held by another client"), "\(both.all)")
        try await lab.startDestination()
        let refused = try await lab.foreignMonitor { _ in
            try await lab.foreignMonitor("second.sock") { _ in try await lab.migrate(more: ["--qmp", socket]) }
        }
        #expect(refused.code == 10 && refused.errors.contains("another client"), "\(refused.all)")
    }

    @Test func whatIsNoMonitorIsRefusedClearly() async throws {
        let lab = try Lab()
        func adopt(_ path: String, _ name: String = "web1") async throws -> ToolResult {
            try await lab.crossdock(
                ["guest", "adopt", name, "--qmp", path, "--state-dir", lab.state("a")],
                seconds: 30
            )
        }
        let missing = try await adopt(lab.directory.file("none.sock"))
        #expect(missing.code == 10 && missing.errors.contains("No such file"), "\(missing.all)")
        try DurableFile.write([1], to: lab.directory.file("plain"))
        let plain = try await adopt(lab.directory.file("plain"))
        #expect(plain.code == 10 && plain.errors.contains("is no socket"), "\(plain.all)")
        // A server that is no QEMU holds the socket.
        let other = try ChildProcess([
            "python3", "-c",
            "import socket,time; s=socket.socket(socket.AF_UNIX); s.bind('\(lab.directory.file("other"))'); s.listen(); print('up', flush=True); time.sleep(600)",
        ])
        try await other.wait(for: "a server") { other.output.contains("up") }
        let wrong = try await adopt(lab.directory.file("other"))
        #expect(wrong.code == 10 && wrong.errors.contains("No QEMU on this host holds"), "\(wrong.all)")
        // The socket of a QEMU that has ended.
        let guest = try await lab.startForeignGuest(["-machine", "none", "-nodefaults"])
        guest.signal(SIGKILL)
        _ = try await guest.finish()
        let gone = try await adopt(lab.directory.file("foreign.sock"))
        #expect(gone.code == 10 && gone.errors.contains("is it still running?"), "\(gone.all)")
        #expect(lab.guests("a").names() == [])
    }

    @Test func aDaemonThatWouldNotFindItsImageAgainIsRefusedBeforeAnythingIsCopied() async throws {
        let lab = try Lab()
        _ = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        let started = try await Tool.run([
            "sh", "-ec",
            """
            cd \(lab.directory.path) && exec qemu-system-x86_64 -machine pc,accel=tcg -m 64 -nodefaults -display none \
            -drive file=disk.raw,format=raw,if=virtio -daemonize -pidfile pid -qmp unix:relative.sock,server=on,wait=off
            """,
        ])
        #expect(started.code == 0, "\(started.all)")
        defer {
            let pid = (try? DurableFile.read(lab.directory.file("pid"))).flatMap { $0 }
            if let pid = pid.flatMap({ Int32(String(decoding: $0.prefix { $0 != 10 }, as: UTF8.self)) }) {
                kill(pid, SIGKILL)
            }
        }
        try await lab.startDestination()
        for more in [["--dry-run"], []] {
            let refused = try await lab.migrate(more: ["--qmp", lab.directory.file("relative.sock")] + more)
            #expect(refused.code == 10 && refused.all.contains("start the guest with the whole path"), "\(refused.all)")
        }
        #expect(!DurableFile.exists("\(lab.state("b"))/images/web1"))
    }

    @Test func aDaemonsRelativePathsAndInheritedDescriptorsAreResolved() async throws {
        let lab = try Lab()
        _ = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        let script = """
            cd \(lab.directory.path) && exec 8<disk.raw 9<>disk.raw && exec qemu-system-x86_64 -machine pc-i440fx-7.2,accel=tcg -m 64 -nodefaults \
            -display none -add-fd fd=8,set=2 -add-fd fd=9,set=2 -drive file=/dev/fdset/2,format=raw,if=virtio,file.locking=off -daemonize -pidfile pid \
            -qmp unix:relative.sock,server=on,wait=off
            """
        let started = try await Tool.run(["sh", "-ec", script])
        #expect(started.code == 0, "\(started.all)")
        let socket = lab.directory.file("relative.sock")
        let adopted = try await lab.crossdock([
            "guest", "adopt", "web1", "--qmp", socket, "--state-dir", lab.state("a"),
        ])
        #expect(adopted.code == 0 && !adopted.errors.contains("cannot be migrated"), "\(adopted.all)")
        try await lab.startDestination()
        let moved = try await lab.migrate()
        #expect(moved.code == 0, "\(moved.all)")
        #expect(DurableFile.exists("\(lab.state("b"))/images/web1/disk.raw"))
    }

    @Test func whateverWasPluggedInAndOutSinceIsPartOfTheGuest() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        _ = try await lab.startForeignGuest([
            "-machine", "q35,accel=tcg", "-m", "64,slots=2,maxmem=1G", "-smp", "1,maxcpus=2", "-nodefaults",
            "-device", "pcie-root-port,id=p0,slot=1", "-device", "pcie-root-port,id=p1,slot=2", "-device",
            "virtio-serial-pci,id=vs0",
            "-drive", "file=\(disk),format=raw,if=none,id=d0", "-device", "virtio-scsi-pci,id=s0",
            "-device", "scsi-hd,drive=d0,id=disk0,bus=s0.0", "-device", "usb-ehci,id=usb0", "-device",
            "usb-tablet,id=tablet0",
        ])
        let second = try await lab.makeImage("second.raw", megabytes: 16, data: 1)
        let console = lab.directory.file("console.sock")
        let commands: [(String, JSONValue)] = [
            ("object-add", ["qom-type": "memory-backend-ram", "id": "m1", "size": 134_217_728]),
            ("device_add", ["driver": "pc-dimm", "id": "dimm1", "memdev": "m1"]),
            (
                "device_add",
                ["driver": "qemu64-x86_64-cpu", "id": "cpu1", "socket-id": 0, "core-id": 1, "thread-id": 0]
            ),
            ("object-add", ["qom-type": "iothread", "id": "io1"]),
            (
                "blockdev-add",
                ["driver": "file", "node-name": "f1", "filename": .string(second), "cache": ["direct": false]]
            ),
            ("blockdev-add", ["driver": "raw", "node-name": "n1", "file": "f1"]),
            ("device_add", ["driver": "virtio-blk-pci", "id": "disk1", "drive": "n1", "bus": "p0", "iothread": "io1"]),
            ("netdev_add", ["type": "user", "id": "net1", "restrict": true]),
            (
                "device_add",
                ["driver": "virtio-net-pci", "id": "nic1", "netdev": "net1", "bus": "p1", "mac": "52:54:00:aa:bb:01"]
            ),
            (
                "chardev-add",
                [
                    "id": "c1",
                    "backend": [
                        "type": "socket",
                        "data": [
                            "addr": ["type": "unix", "data": ["path": .string(console)]], "server": true, "wait": false,
                        ],
                    ],
                ]
            ),
            ("device_add", ["driver": "virtserialport", "id": "port1", "chardev": "c1", "name": "org.example.one"]),
            ("device_del", ["id": "tablet0"]),
        ]
        let before = try await lab.foreignMonitor { monitor in
            for (command, arguments) in commands { try await monitor.execute(command, arguments) }
            for _ in 0..<200 {
                let left = try await monitor.execute("qom-list", ["path": "/machine/peripheral"]).array
                if !left.contains(where: { $0["name"]?.string == "tablet0" }) { break }
                await monitor.loop.sleep(for: .milliseconds(20))
            }
            return try await MachineFingerprint(of: monitor)
        }
        #expect(before.devices["/machine/peripheral/tablet0"] == nil && before.processors == 2)
        try await lab.startDestination()
        let moved = try await lab.migrate(more: ["--qmp", lab.directory.file("foreign.sock")])
        #expect(moved.code == 0, "\(moved.all)")
        #expect(try await lab.identity("b").differences(from: before) == [])
        let record = try #require(try lab.guests("b").load("web1"))
        #expect(record.commandLine.arguments.contains { $0.contains("second.raw") && $0.contains("images/web1") })
        #expect(record.commandLine.arguments.contains { $0.hasPrefix("user,") && $0.contains("restrict=on") })
        #expect(DurableFile.exists("\(lab.guests("b").directory(of: "web1"))/run/console.sock"))
    }

    @Test func forwardsAreDescribedAsTheyAreNow() async throws {
        let lab = try Lab()
        let (first, second) = (try await freePort(), try await freePort())
        _ = try await lab.startForeignGuest([
            "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-netdev",
            "user,id=n0,hostfwd=tcp:127.0.0.1:\(first)-:22,restrict=on", "-device", "virtio-net-pci,netdev=n0",
        ])
        let line = GuestCommandLine(arguments: [], directory: "/")
        func network(after commands: [String]) async throws -> String {
            try await lab.foreignMonitor { monitor in
                for command in commands {
                    let answer = try await monitor.execute("human-monitor-command", ["command-line": .string(command)])
                    #expect(answer.string == "" || answer.string?.contains("removed") == true, "\(answer)")
                }
                let emulator = try RunningEmulator.find(monitor: lab.directory.file("foreign.sock"))
                var running = line
                running.arguments = emulator.arguments
                let words = try await GuestInspection.inspect(monitor, running, emulator).commandLine.arguments
                return words[(words.firstIndex(of: "-netdev") ?? 0) + 1]
            }
        }
        #expect(try await network(after: []) == "user,id=n0,hostfwd=tcp:127.0.0.1:\(first)-:22,restrict=on")
        let added = "hostfwd_add n0 udp:127.0.0.1:\(second)-10.0.2.20:53"
        let both = try await network(after: [added])
        #expect(both.contains("hostfwd=tcp:127.0.0.1:\(first)-:22") && both.contains("restrict=on"), "\(both)")
        #expect(both.contains("hostfwd=udp:127.0.0.1:\(second)-10.0.2.20:53"), "\(both)")
        let one = try await network(after: ["hostfwd_remove n0 tcp:127.0.0.1:\(first)"])
        #expect(!one.contains(":22") && one.contains("udp:127.0.0.1:\(second)"), "\(one)")
    }

    @Test func aSecretInClearOnACommandLineIsNotWrittenDown() async throws {
        let lab = try Lab()
        _ = try await lab.startForeignGuest([
            "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-object", "secret,id=s0,data=Open-Sesame-4711",
        ])
        let socket = lab.directory.file("foreign.sock")
        let adopted = try await lab.crossdock([
            "guest", "adopt", "web1", "--qmp", socket, "--state-dir", lab.state("a"),
        ])
        #expect(adopted.code == 0 && !adopted.errors.contains("cannot be migrated"), "\(adopted.all)")
        let shown = try await lab.crossdock(["guest", "show", "web1", "--state-dir", lab.state("a")])
        #expect(shown.code == 0 && !shown.all.contains("Open-Sesame"), "\(shown.all)")
        try await lab.startDestination()
        #expect(try await lab.migrate().code == 0)
        let found = try await Tool.run(["grep", "-rlF", "Open-Sesame", lab.state("a"), lab.state("b")])
        #expect(found.output == "", "\(found.output)")
        // And nobody is helped to put one there.
        let started = try await lab.crossdock(
            [
                "guest", "start", "other", "--state-dir", lab.state("a"), "--", "qemu-system-x86_64", "-object",
                "secret,id=s,data=x",
            ]
        )
        #expect(started.code == 10 && started.errors.contains("in clear"), "\(started.all)")
    }

    @Test func aDiscThatWasEjectedOrChangedIsTheOneThatTheGuestHasNow() async throws {
        let lab = try Lab()
        let first = try await lab.makeImage("first.iso", megabytes: 4, data: 1)
        let second = try await lab.makeImage("second.iso", megabytes: 4, data: 1)
        _ = try await lab.startForeignGuest([
            "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-cdrom", first,
            "-drive", "file=\(first),media=cdrom,id=cd1,if=none", "-device", "ide-cd,drive=cd1,id=two,bus=ide.0",
        ])
        _ = try await lab.foreignMonitor { monitor in
            try await monitor.execute("eject", ["device": "ide1-cd0", "force": true])
            try await monitor.execute(
                "blockdev-change-medium",
                ["id": "two", "filename": .string(second), "force": true]
            )
        }
        unlink(first)
        try await lab.startDestination()
        let moved = try await lab.migrate(more: ["--qmp", lab.directory.file("foreign.sock")])
        #expect(moved.code == 0, "\(moved.all)")
        let drives = try await lab.monitor("b") { try await $0.execute("query-block").array }
        let media = drives.map { ($0["device"]?.string ?? "", $0["inserted"]?["file"]?.string) }
        #expect(media.contains { $0.0 == "ide1-cd0" && $0.1 == nil }, "\(media)")
        #expect(media.contains { $0.0 == "cd1" && $0.1 != nil }, "\(media)")
    }

    /// A guest on a disk of a kind that only looks like one on the network.
    @Test(arguments: [
        (
            [
                "-blockdev",
                "driver=quorum,node-name=q,vote-threshold=1,children.0.driver=raw,children.0.file.driver=file,children.0.file.filename=DISK",
            ], "quorum"
        ),
        (["-blockdev", "driver=raw,node-name=q,offset=1048576,file.driver=file,file.filename=DISK"], "slice"),
    ])
    func aDiskThatCannotBeDescribedIsRefused(_ words: [String], _ reason: String) async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        _ = try await lab.startForeignGuest(
            ["-machine", "pc,accel=tcg", "-m", "64", "-nodefaults"] + words.map { $0.replacing("DISK", with: disk) }
                + ["-device", "virtio-blk-pci,drive=q"]
        )
        try await lab.startDestination()
        let refused = try await lab.migrate(more: ["--qmp", lab.directory.file("foreign.sock")])
        #expect(refused.code == 10 && refused.errors.contains(reason), "\(refused.all)")
    }

    @Test func aDryRunOfAQEMUThatIsNotKnownLeavesItSo() async throws {
        let lab = try Lab()
        _ = try await lab.startForeignGuest(["-machine", "pc,accel=tcg", "-m", "64", "-nodefaults"])
        try await lab.startDestination()
        let socket = lab.directory.file("foreign.sock")
        let rehearsed = try await lab.migrate(more: ["--qmp", socket, "--dry-run"])
        #expect(rehearsed.code == 0, "\(rehearsed.all)")
        let listed = try await lab.crossdock(["guest", "list", "--json", "--state-dir", lab.state("a")])
        #expect(listed.code == 0 && !listed.output.contains("web1"), "\(listed.all)")
        #expect(DurableFile.list("\(lab.state("a"))/guests") == [])
        #expect(try await lab.migrate(more: ["--qmp", socket]).code == 0)
    }

    @Test func aQEMUThatHangsOrWhoseSocketIsGoneIsSaidClearlyAndInTime() async throws {
        let lab = try Lab()
        let socket = lab.directory.file("foreign.sock")
        let guest = try await lab.startForeignGuest(["-machine", "pc,accel=tcg", "-m", "64", "-nodefaults"])
        let adopt = ["guest", "adopt", "web1", "--qmp", socket, "--state-dir", lab.state("a")]
        guest.signal(SIGSTOP)
        let frozen = try await lab.crossdock(adopt, seconds: 30)
        #expect(frozen.code == 10 && frozen.errors.contains("is frozen and answers nobody"), "\(frozen.all)")
        guest.signal(SIGCONT)
        // Another client has the only monitor.
        let held = try await lab.foreignMonitor { _ in try await lab.crossdock(adopt, seconds: 30) }
        #expect(held.code == 0 && held.errors.contains("does not answer"), "\(held.all)")
        try await lab.startDestination()
        guest.signal(SIGSTOP)
        for more in [["--dry-run"], ["--qmp", socket]] {
            let refused = try await lab.migrate(more: more)
            #expect(refused.code == 10 && refused.errors.contains("is frozen and answers nobody"), "\(refused.all)")
        }
        let seen = try await lab.crossdock(["guest", "list", "--state-dir", lab.state("a")], seconds: 30)
        #expect(seen.code == 0 && seen.output.contains("frozen"), "\(seen.all)")
        guest.signal(SIGCONT)
        unlink(socket)
        let gone = try await lab.migrate()
        #expect(gone.code == 10, "\(gone.all)")
        #expect(gone.errors.contains(socket) && gone.errors.contains("No such file"), "\(gone.all)")
        let listed = try await lab.crossdock(["guest", "list", "--state-dir", lab.state("a")], seconds: 30)
        #expect(listed.code == 0 && listed.output.contains("unknown"), "\(listed.all)")
    }

    /// Processes come and go while /proc is read.
    @Test func processesThatEndWhileTheyAreLookedAtDoNoHarm() async throws {
        let lab = try Lab()
        let guest = try await lab.startForeignGuest(["-machine", "none", "-nodefaults"])
        let socket = lab.directory.file("foreign.sock")
        let others = try ChildProcess([
            "sh", "-c",
            "while :; do qemu-system-x86_64 --version >/dev/null & qemu-system-i386 --version >/dev/null; wait; done",
        ])
        for _ in 0..<100 { #expect(try RunningEmulator.find(monitor: socket).process.pid == guest.pid) }
        for pid in DurableFile.list("/proc").compactMap({ Int32($0) }) where pid != guest.pid {
            // Whatever it is, it is read or refused.
            _ = try? RunningEmulator(pid: pid)
        }
        others.signal(SIGKILL)
    }
}
