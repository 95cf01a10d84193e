import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// The blank copy that moves before anything of the guest does, and what it is compared for.
@Suite(.serialized, .timeLimit(.minutes(24)))
struct RehearsalEndToEnd {
    /// A blank copy must leave every file, socket and byte of shared memory alone, and nothing behind.
    @Test func aRehearsalTouchesNothingOfTheGuest() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 32, data: 2)
        let memory = lab.directory.file("shared-memory")
        let filled = try await Tool.run(["dd", "if=/dev/urandom", "of=\(memory)", "bs=1M", "count=64", "status=none"])
        #expect(filled.code == 0)
        _ = try await lab.startForeignGuest([
            "-machine", "pc,accel=tcg", "-m", "64,slots=2,maxmem=1G", "-nodefaults", "-vnc",
            "unix:\(lab.directory.file("vnc.sock"))",
            "-object", "memory-backend-file,id=shared,size=64M,mem-path=\(memory),share=on,prealloc=on",
            "-device", "pc-dimm,memdev=shared,id=dimm0", "-drive", "file=\(disk),format=raw,if=virtio",
            "-serial", "file:\(lab.directory.file("serial.log"))", "-pidfile", lab.directory.file("pid"),
            "-chardev", "socket,id=c0,path=\(lab.directory.file("chardev.sock")),server=on,wait=off", "-device",
            "virtio-serial",
            "-device", "virtconsole,chardev=c0", "-netdev", "user,id=n0", "-device", "e1000,netdev=n0",
        ])
        // What a QEMU is started with in the rehearsal, on either side.
        let calls = lab.directory.file("calls.log")
        let temporary = lab.directory.directory("tmp")
        lab.prefix = ["env", "TMPDIR=\(temporary)"]
        let tools = try lab.makeEmulator(#"echo "$@" >> \#(calls); exec /usr/bin/qemu-system-x86_64 "$@""#)
        try await lab.startDestination(environment: ["PATH": tools], more: ["--no-confinement"])
        try await eventually("the display is there") { isListening(lab.directory.file("vnc.sock")) }
        let before = try lab.snapshot()
        let result = try await lab.migrate(more: ["--dry-run", "--qmp", lab.directory.file("foreign.sock")])
        #expect(result.code == 0, "\(result.all)")
        let after = try lab.snapshot()
        for (name, text) in before { #expect(after[name] == text, "\(name)") }
        #expect(Set(after.keys).subtracting(before.keys) == ["calls.log"])
        let started = String(decoding: try DurableFile.read(calls) ?? [], as: UTF8.self)
        let lines = started.split(separator: "\n").filter { $0.contains("-incoming") }
        #expect(lines.count == 1, "\(started)")
        for word in [
            "disk.raw", "shared-memory", "serial.log", "vnc.sock", "chardev.sock", "/pid", "prealloc", "user,id=n0",
        ] {
            #expect(!lines.contains { $0.contains(word) }, "\(word)")
        }
        #expect(try lab.leftAtDestination() == [])
        #expect(Lab.processes(containing: "\(temporary)/crossdock-").isEmpty)
        #expect(DurableFile.list(temporary).isEmpty)
    }

    /// A destination whose QEMU makes another machine of the same words.
    struct Mutation: Sendable, CustomStringConvertible {
        var description: String
        /// A sed expression over the arguments, one a line.
        var edit: String
        var reason: String
        /// What is put behind the arguments.
        var more = ""
        var program = "/usr/bin/qemu-system-x86_64"
    }

    static let mutations = [
        Mutation(description: "memory size", edit: "s/^64$/96/", reason: "memory"),
        Mutation(
            description: "older machine",
            edit: "s/pc-i440fx-7.2/pc-i440fx-6.0/",
            reason: "The machine is pc-i440fx-7.2 here and pc-i440fx-6.0 there"
        ),
        Mutation(
            description: "one processor more",
            edit: "s/cpus=1,sockets=2/cpus=2,sockets=2/",
            reason: "1 processors here and 2 there"
        ),
        Mutation(description: "another topology", edit: "s/sockets=2,cores=1/sockets=1,cores=2/", reason: "core"),
        Mutation(
            description: "other queues",
            edit: "s/num-queues=3/num-queues=2/",
            reason: "'disk0' has num-queues=3 here and 2 there"
        ),
        Mutation(
            description: "a processor feature less",
            edit: "s/,sse3=on/,sse3=off/",
            reason: "feature 'sse3' is on here and off there"
        ),
        Mutation(
            description: "a processor feature more",
            edit: "s/,aes=off/,aes=on/",
            reason: "feature 'aes' is off here and on there"
        ),
        Mutation(description: "another processor", edit: "s/^qemu64,.*/Nehalem/", reason: "model"),
        Mutation(
            description: "an extra device",
            edit: "",
            reason: "(virtio-rng-pci) is there and not here",
            more: "-device virtio-rng-pci,addr=1e.0"
        ),
        Mutation(
            description: "a missing device",
            edit: "/^virtio-balloon/d;s/^-device-balloon$//",
            reason: "'balloon0' (virtio-balloon-pci) is here and not there"
        ),
        Mutation(
            description: "another firmware's size",
            edit: "",
            reason: "pc.bios",
            more: "-L FIRMWARE"
        ),
        Mutation(description: "another address", edit: "s/addr=b.0/addr=c.0/", reason: "'balloon0' has addr="),
        Mutation(
            description: "another build",
            edit: "",
            reason: "does not know the machine type 'pc-i440fx-7.2'",
            program: "/usr/bin/qemu-system-x86_64-microvm"
        ),
    ]

    @Test(arguments: mutations)
    func aDestinationThatWouldMakeAnotherMachineIsCaught(_ mutation: Mutation) async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 32, data: 2)
        _ = try await lab.startForeignGuest([
            "-machine", "pc-i440fx-7.2,accel=tcg", "-m", "64", "-smp", "1,sockets=2,cores=1,maxcpus=2", "-nodefaults",
            "-cpu",
            "qemu64",
            "-drive", "file=\(disk),format=raw,if=none,id=d0", "-device",
            "virtio-blk-pci,drive=d0,id=disk0,num-queues=3",
            "-device", "virtio-balloon-pci,id=balloon0,addr=b.0",
        ])
        // Firmware of half the size, before the one that QEMU finds otherwise.
        let firmware = lab.directory.directory("firmware")
        let made = try await Tool.run(["truncate", "-s", "128K", "\(firmware)/bios-256k.bin"])
        #expect(made.code == 0, "\(made.all)")
        // The arguments are edited one a line; an option whose value is gone goes too.
        let script = """
            case "$*" in *"-machine none"*) exec \(mutation.program) "$@";; esac
            printf '%s\\n' "$@" | sed -e '\(mutation.edit)' | awk '
                held != "" { if ($0 ~ /^-/) { held = $0; next } print held; held = "" }
                $0 == "-device" { held = $0; next } { print }' > \(lab.directory.path)/$$.args
            set --; while IFS= read -r word; do set -- "$@" "$word"; done < \(lab.directory.path)/$$.args
            exec \(mutation.program) "$@" \(mutation.more.replacing("FIRMWARE", with: firmware))
            """
        try await lab.startDestination(
            environment: ["PATH": try lab.makeEmulator(script)],
            more: ["--no-confinement"]
        )
        for more in [["--dry-run"], []] {
            let result = try await lab.migrate(more: more + ["--qmp", lab.directory.file("foreign.sock")])
            #expect(result.code == MigrationError.Code.refused.rawValue, "\(result.all)")
            #expect(result.errors.contains(mutation.reason), "'\(mutation.reason)' is not in: \(result.all)")
            #expect(!result.output.contains("copying disks"))
        }
        #expect(try await lab.foreignMonitor { try await $0.status() } == "running")
        try await eventually("the destination has cleaned up") { try lab.leftAtDestination() == [] }
    }

    @Test func portsAndBridgesThatTheOtherHostDoesNotHaveAreNamedBeforeAnythingMoves() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        let port = try await freePort()
        // Both hosts are this machine: the port that the guest has is taken there.
        _ = try await lab.startForeignGuest([
            "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-drive", "file=\(disk),format=raw,if=virtio",
            "-netdev", "user,id=n0,hostfwd=tcp:127.0.0.1:\(port)-:22", "-device", "virtio-net-pci,netdev=n0",
        ])
        try await lab.startDestination()
        for more in [["--dry-run"], []] {
            let result = try await lab.migrate(more: more + ["--qmp", lab.directory.file("foreign.sock")])
            #expect(result.code == 13 && result.errors.contains("port \(port) of -netdev"), "\(result.all)")
        }
        #expect(try lab.leftAtDestination() == [])
        #expect(try await lab.foreignMonitor { try await $0.status() } == "running")
    }

    /// What QEMU adds by itself must be the same on the other side.
    @Test(arguments: [
        [], ["-nic", "user,model=e1000", "-vga", "cirrus"], ["-net", "nic,model=virtio", "-net", "user"],
        ["-nographic", "-monitor", "none"], ["-machine", "q35,accel=tcg", "-usb", "-device", "usb-tablet"],
        ["-machine", "pc-i440fx-6.2,accel=tcg", "-cpu", "Nehalem,-sse4.2", "-smp", "sockets=2,cores=2"],
        ["-cpu", "max", "-rtc", "base=localtime", "-boot", "order=d", "-cdrom", "MEDIA", "-k", "de", "-nic", "none"],
        [
            "-readconfig", "CONFIG", "-name", "x,process=y", "-device", "intel-hda", "-device", "hda-duplex,audiodev=a",
            "-audiodev", "none,id=a",
        ],
    ])
    func aGuestWithQEMUsDefaultsIsTheSameThere(_ arguments: [String]) async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        let media = try await lab.makeImage("media.iso", megabytes: 4, data: 1)
        let config = lab.directory.file("qemu.cfg")
        try DurableFile.write(
            Array("# comment\n[memory]\n  size = \"96\"\n[smp-opts]\n  cpus = \"2\"\n".utf8),
            to: config
        )
        var words = arguments.map { $0 == "MEDIA" ? media : $0 == "CONFIG" ? config : $0 }
        if !words.contains("-machine") { words += ["-machine", "pc,accel=tcg"] }
        _ = try await lab.startForeignGuest(words + ["-hda", disk])
        let before = try await lab.fingerprint("foreign.sock")
        try await lab.startDestination()
        let moved = try await lab.migrate(more: ["--qmp", lab.directory.file("foreign.sock")])
        #expect(moved.code == 0, "\(moved.all)")
        #expect(try await lab.identity("b").differences(from: before) == [])
    }

    /// QEMU without a word about its display opens a window, or listens for VNC where the guest's user on the other host may not.
    @Test func aGuestWithoutADisplayMovesAndThatIsSaid() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        let words = [
            "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "64", "-drive", "file=\(disk),format=raw,if=virtio",
        ]
        let started = try await lab.crossdock(
            ["guest", "start", "web1", "--state-dir", lab.state("a"), "--"] + lab.portable(words)
        )
        #expect(started.code == 0, "\(started.all)")
        try await lab.startDestination()
        let shown = try await lab.crossdock(["guest", "show", "web1", "--state-dir", lab.state("a")])
        #expect(shown.output.contains("no -display: -display none"), "\(shown.all)")
        let moved = try await lab.migrate()
        #expect(moved.code == 0, "\(moved.all)")
        #expect(try await lab.monitor("b") { try await $0.status() } == "running")
    }

    /// Other names of drivers, devices without ids, a device that was plugged in anew under its name, memory too.
    @Test func whatIsTakenForAnotherByItsNameIsDescribedAsWhatItIs() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        // The machine's own memory is an object as well, made before the one that is removed: under TCG, QEMU looks for the
        // changes of every memory where the first one was made, and aborts in the migration when it is gone.
        _ = try await lab.startForeignGuest([
            "-machine", "pc,accel=tcg,memory-backend=m0", "-m", "64,slots=2,maxmem=1G", "-nodefaults", "-object",
            "memory-backend-ram,id=m0,size=64M", "-drive", "file=\(disk),format=raw,if=virtio", "-netdev",
            "hubport,id=n0,hubid=1", "-netdev", "hubport,id=n1,hubid=2",
            "-device", "e1000-82540em,netdev=n0", "-device", "e1000,netdev=n1,mac=52:54:00:00:00:99", "-device",
            "virtio-rng", "-device", "virtio-rng-pci", "-chardev", "null,mux=on,id=m", "-mon", "chardev=m", "-serial",
            "chardev:m", "-audiodev", "none,id=a0", "-device", "AC97,audiodev=a0", "-device", "qemu-xhci,id=x0",
            "-device", "usb-tablet,id=t0,port=1", "-object", "memory-backend-ram,id=m1,size=256M",
        ])
        let commands: [(String, JSONValue)] = [
            ("object-del", ["id": "m1"]),
            ("object-add", ["qom-type": "memory-backend-ram", "id": "m1", "size": 134_217_728]),
            ("device_add", ["driver": "pc-dimm", "id": "dimm1", "memdev": "m1"]),
            ("device_del", ["id": "t0"]),
            ("device_add", ["driver": "usb-kbd", "id": "t0", "bus": "x0.0", "port": "3"]),
        ]
        try await lab.foreignMonitor { monitor in
            for (command, arguments) in commands { try await monitor.execute(command, arguments) }
        }
        let before = try await lab.fingerprint("foreign.sock")
        #expect(before.usbPorts == ["t0": "3"] && before.devices["/machine/peripheral/t0"] == "usb-kbd")
        try await lab.startDestination()
        let moved = try await lab.migrate(more: ["--qmp", lab.directory.file("foreign.sock")])
        #expect(moved.code == 0, "\(moved.all)")
        #expect(try await lab.identity("b").differences(from: before) == [])
    }

    // MARK: between versions

    /// What a rehearsal between two versions says.
    private func rehearse(_ emulators: (String, String), _ guest: [String]) async throws -> ToolResult {
        let lab = try Lab(emulators: emulators)
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        _ = try await lab.startForeignGuest(
            ["-m", "64", "-nodefaults", "-drive", "file=\(disk),format=raw,if=virtio"] + guest
        )
        try await lab.startDestination()
        let result = try await lab.migrate(more: ["--dry-run", "--qmp", lab.directory.file("foreign.sock")])
        #expect(try await lab.foreignMonitor { try await $0.status() } == "running")
        #expect(try lab.leftAtDestination() == [])
        return result
    }

    @Test func aProcessorFeatureThatTheOtherQEMUDoesNotHaveIsNamedWithWhatToDo() async throws {
        let machine = ["-machine", "pc-i440fx-7.2,accel=tcg"]
        // What QEMU 7.2 emulates as `max` has one feature that 10.0 gave up.
        let refused = try await rehearse(("7.2", "10.0"), machine + ["-cpu", "max"])
        #expect(refused.code == 13, "\(refused.all)")
        let sentence =
            "The processor feature 'pcommit' is on here and off there; start the guest with pcommit=off in -cpu"
        #expect(refused.errors.contains(sentence), "\(refused.all)")
        // It is the only one, and the advice is good.
        #expect(refused.errors.ranges(of: "processor feature").count == 1, "\(refused.all)")
        let advised = try await rehearse(("7.2", "10.0"), machine + ["-cpu", "max,pcommit=off"])
        #expect(advised.code == 0, "\(advised.all)")
        // And the other way round, one that 7.2 never heard of.
        let unknown = try await rehearse(("10.0", "7.2"), machine + ["-cpu", "max"])
        #expect(unknown.code == 13 && unknown.errors.contains("=on, which QEMU 7.2."), "\(unknown.all)")
        #expect(
            unknown.errors.contains("=off in -cpu, or with a processor model that both QEMUs have"),
            "\(unknown.all)"
        )
    }

    @Test func aMachineVersionThatTheOtherQEMUDoesNotHaveIsNamed() async throws {
        let refused = try await rehearse(("10.0", "7.2"), ["-machine", "pc,accel=tcg"])
        #expect(refused.code == 13, "\(refused.all)")
        #expect(refused.errors.contains("does not know the machine type 'pc-i440fx-10.0'"), "\(refused.all)")
    }

    @Test func aPropertyThatTheOtherQEMUDoesNotKnowIsLeftOutWhenItChangesNothingAndNamedOtherwise() async throws {
        let machine = ["-machine", "pc-i440fx-7.2,accel=tcg"]
        let taken = try await rehearse(
            ("10.0", "7.2"),
            machine + ["-device", "virtio-rng-pci,in_order=off", "-device", "virtio-balloon,id=balloon0"]
        )
        #expect(taken.code == 0, "\(taken.all)")
        let refused = try await rehearse(("10.0", "7.2"), machine + ["-device", "virtio-rng-pci,id=rng0,in_order=on"])
        #expect(refused.code == 13, "\(refused.all)")
        #expect(
            refused.errors.contains("The virtio-rng-pci 'rng0' has in_order=on, which QEMU 7.2."),
            "\(refused.all)"
        )
    }

    @Test func optionsOfOneVersionReachTheOtherInItsOwnWords() async throws {
        let lab = try Lab(emulators: ("10.0", "7.2"))
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        let (console, monitor) = (lab.directory.file("console.sock"), lab.directory.file("own.sock"))
        _ = try await lab.startForeignGuest([
            "-machine", "pc-i440fx-7.2,accel=tcg,memory-backend=m0", "-m", "64", "-nodefaults", "-object",
            "memory-backend-shm,id=m0,size=64M", "-drive", "file=\(disk),format=raw,if=virtio",
            "-chardev", "socket,id=c0,path=\(monitor),server=on,wait=off", "-mon", "chardev=c0,mode=control",
            "-serial", "tcp:127.0.0.1:\(try await freePort()),reconnect-ms=1500", "-chardev",
            "socket,id=c1,path=\(console),server=on,wait=off", "-device", "virtio-serial", "-device",
            "virtconsole,chardev=c1", "-device", "pvpanic,ioport=1285", "-smp", "2,sockets=1,cores=2",
        ])
        let shown = try await lab.crossdock([
            "guest", "adopt", "web1", "--qmp", lab.directory.file("foreign.sock"), "--state-dir", lab.state("a"),
        ])
        #expect(shown.code == 0 && !shown.all.contains("cannot be migrated"), "\(shown.all)")
        try await lab.startDestination()
        let moved = try await lab.migrate()
        #expect(moved.code == 0, "\(moved.all)")
        let line = try #require(try lab.guests("b").load("web1")).commandLine.arguments
        #expect(
            line.contains { $0.contains("reconnect=2") } && !line.contains { $0.contains("reconnect-ms") },
            "\(line)"
        )
        #expect(line.contains("chardev:c0") && !line.contains("-mon"), "\(line)")
        #expect(line.contains { $0.hasPrefix("memory-backend-memfd,id=m0") }, "\(line)")
    }
}
