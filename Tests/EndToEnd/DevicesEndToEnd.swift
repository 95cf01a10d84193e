import Emulator
import IO
import Migration
import TestSupport
import Testing

/// Real Linux guests that have bound drivers to their devices and use them.
@Suite(.serialized, .timeLimit(.minutes(24)))
struct DevicesEndToEnd {
    /// A machine, and where what is plugged in later goes.
    struct Machine: Sendable, CustomStringConvertible {
        var description: String
        var options: [String]
        var bus: String
        /// The bus of a device that is plugged in.
        var slot: [String: JSONValue]
    }

    static let machines = [
        Machine(
            description: "q35",
            options: [
                "-machine", "q35,accel=tcg", "-device", "pcie-root-port,id=rp0,chassis=1", "-device",
                "pcie-root-port,id=rp1,chassis=2,multifunction=on,addr=1c.0", "-device",
                "pcie-root-port,id=rp2,chassis=3,addr=1c.1", "-device", "virtio-net,netdev=n0,id=nic0,bus=rp1",
            ],
            bus: "rp0",
            slot: ["bus": "rp0"]
        ),
        Machine(
            description: "pc",
            options: [
                "-machine", "pc,accel=tcg", "-device", "pci-bridge,id=br0,chassis_nr=1", "-device",
                "e1000,netdev=n0,id=nic0,bus=br0,addr=5.0", "-device", "virtio-rng-pci,addr=9.0,multifunction=on",
                "-device", "virtio-rng-pci,addr=9.1,id=second",
            ],
            bus: "pci.0",
            slot: [:]
        ),
    ]

    /// What a guest sees of its PCI devices: where they are, and what they are.
    private static func slots(_ monitor: QMPClient) async throws -> [String] {
        func devices(_ bus: JSONValue) -> [String] {
            (bus["devices"]?.array ?? []).flatMap { device -> [String] in
                let id = device["id"]
                let place =
                    "\(device["bus"]?.text ?? ""):\(device["slot"]?.text ?? "").\(device["function"]?.text ?? "")"
                let kind = "\(id?["vendor"]?.text ?? ""):\(id?["device"]?.text ?? "") \(device["qdev_id"]?.text ?? "")"
                return ["\(place) \(kind)"] + (device["pci_bridge"].map(devices) ?? [])
            }
        }
        return try await monitor.execute("query-pci").array.flatMap(devices).sorted()
    }

    @Test(arguments: machines)
    func aGuestThatUsesItsDevicesMovesAndGoesOnUsingThem(_ machine: Machine) async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 32, data: 2)
        let scsi = try await lab.makeImage("scsi.raw", megabytes: 16, data: 1)
        let plugged = try await lab.makeImage("plugged.raw", megabytes: 16, data: 1)
        let disc = try await lab.makeImage("disc.iso", megabytes: 4, data: 1)
        let command =
            ["qemu-system-x86_64"] + machine.options + [
                "-cpu", "Nehalem", "-m", "320", "-nodefaults", "-display", "none", "-no-reboot",
                "-kernel", "\(Lab.guestFiles)/vmlinuz-devices", "-initrd", "\(Lab.guestFiles)/initrd-devices",
                "-append",
                "console=ttyS0 quiet no_timer_check", "-drive", "file=\(disk),format=raw,if=virtio", "-serial",
                "file:\(lab.directory.file("console.log"))",
                "-device", "virtio-balloon-pci,id=balloon0", "-device", "virtio-rng-pci", "-device",
                "virtio-serial-pci",
                "-chardev", "null,id=c0", "-device", "virtconsole,chardev=c0", "-chardev", "null,id=c1", "-device",
                "virtserialport,chardev=c1,name=org.example.one", "-netdev", "user,id=n0,restrict=on",
                "-device", "virtio-scsi-pci,id=s0", "-drive", "file=\(scsi),format=raw,if=none,id=sd0", "-device",
                "scsi-hd,drive=sd0", "-drive", "file=\(disc),format=raw,media=cdrom,if=none,id=cd0", "-device",
                "scsi-cd,drive=cd0,bus=s0.0", "-device", "virtio-keyboard-pci", "-device", "virtio-tablet-pci",
                "-device", "virtio-gpu-pci", "-audiodev", "none,id=a0", "-device", "AC97,audiodev=a0",
                "-device", "i6300esb", "-device", "qemu-xhci,id=x0", "-device", "usb-mouse,id=mouse0",
            ]
        let started = try await lab.crossdock(
            ["guest", "start", "web1", "--state-dir", lab.state("a"), "--"] + lab.portable(command)
        )
        #expect(started.code == 0, "\(started.all)")
        try await eventually(seconds: 120, "the guest uses its devices") {
            try self.drivers(lab.consoleA).isSuperset(of: ["virtio_balloon", "sd", "usbhid"])
                && lab.records(lab.consoleA) > 20
        }
        let commands: [(String, JSONValue)] = [
            (
                "qom-set",
                ["path": "/machine/peripheral/balloon0", "property": "guest-stats-polling-interval", "value": 1]
            ),
            ("device_add", ["driver": "usb-hub", "id": "hub1", "bus": "x0.0", "port": "2"]),
            ("device_add", ["driver": "usb-tablet", "id": "tablet1", "bus": "x0.0", "port": "2.1"]),
            ("device_add", ["driver": "usb-kbd", "id": "keyboard1", "bus": "x0.0"]),
            (
                "blockdev-add",
                [
                    "driver": "raw", "node-name": "p0",
                    "file": ["driver": "file", "node-name": "p0f", "filename": .string(plugged)],
                ]
            ),
            ("device_add", ["driver": "scsi-hd", "id": "plugged0", "drive": "p0", "bus": "s0.0"]),
            (
                "device_add",
                .object(
                    ["driver": "virtio-rng-pci", "id": "rng9"].merging(machine.slot) { $1 }
                )
            ),
        ]
        let before = try await lab.monitor("a") { monitor in
            for (command, arguments) in commands {
                try await monitor.execute(command, arguments)
            }
            return try await Self.slots(monitor)
        }
        // The guest has found what was plugged in, and reports statistics.
        try await eventually(seconds: 60, "the guest uses what was plugged in") {
            try self.drivers(lab.consoleA).isSuperset(of: ["hub", "hid-generic"])
        }
        try await eventually(seconds: 60, "the guest reports statistics") {
            let stats = try await lab.monitor("a") {
                try await $0.execute("qom-get", ["path": "/machine/peripheral/balloon0", "property": "guest-stats"])
            }
            return (stats["last-update"]?.integer ?? 0) > 0
        }
        let drivers = try drivers(lab.consoleA)
        try await lab.startDestination()
        let moved = try await lab.migrate()
        #expect(moved.code == 0, "\(moved.all)")
        #expect(try await lab.monitor("b") { try await Self.slots($0) } == before)
        try await eventually(seconds: 60, "the guest goes on using its devices") {
            try lab.records(lab.consoleB) > 20 && self.drivers(lab.consoleB) == drivers
        }
    }

    /// The drivers that the guest has bound, as it says now and then.
    private func drivers(_ console: String) throws -> Set<String> {
        let text = String(decoding: try DurableFile.read(console) ?? [], as: UTF8.self)
        let line = text.split(whereSeparator: \.isNewline).dropLast().last { $0.hasPrefix("DEVICES ") }
        return Set((line ?? "").split(separator: " ").dropFirst().map(String.init))
    }

    /// The rehearsal of a guest with much memory weighs nothing, on either host.
    @Test func aBlankCopyOfAGuestWithMuchMemoryHasAlmostNone() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        _ = try await lab.startForeignGuest([
            "-machine", "pc,accel=tcg,memory-backend=pc.ram", "-m", "64G", "-nodefaults", "-object",
            "memory-backend-ram,id=pc.ram,size=64G,reserve=off", "-drive", "file=\(disk),format=raw,if=virtio",
        ])
        let temporary = lab.directory.directory("tmp")
        lab.prefix = ["env", "TMPDIR=\(temporary)"]
        try await lab.startDestination(environment: ["TMPDIR": temporary])
        let largest = Guarded<Int>(0)
        let isOver = Guarded<Bool>(false)
        let watching = Task {
            while !isOver.withLock({ $0 }) {
                for (pid, line) in Lab.processes(containing: "\(temporary)/crossdock-")
                where line.contains("qemu-system") {
                    let status = String(
                        decoding: ((try? DurableFile.read("/proc/\(pid)/status")) ?? nil) ?? [],
                        as: UTF8.self
                    )
                    let row = status.split(separator: "\n").first { $0.hasPrefix("VmRSS:") } ?? ""
                    let kilobytes = row.split(separator: " ").dropFirst().first.flatMap { Int($0) } ?? 0
                    largest.withLock { $0 = max($0, kilobytes) }
                }
                await Task.yield()
            }
        }
        let report = lab.directory.file("report.json")
        let rehearsed = try await lab.migrate(
            more: ["--dry-run", "--report", report, "--qmp", lab.directory.file("foreign.sock")]
        )
        isOver.withLock { $0 = true }
        await watching.value
        #expect(rehearsed.code == 0, "\(rehearsed.all)")
        let seen = largest.withLock { $0 }
        #expect(seen > 0 && seen <= 64 << 10, "\(seen) KiB are resident")
        #expect(try #require(try lab.report(report).rehearsal).bytes <= 2_000_000)
        #expect(DurableFile.list("/dev/shm").allSatisfy { !$0.hasPrefix("qemu_back_mem") })
    }
}
