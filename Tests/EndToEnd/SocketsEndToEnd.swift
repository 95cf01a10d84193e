import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// Where displays, serial ports and agents of a guest are found: under the same path of the state directory on each host.
@Suite(.serialized, .timeLimit(.minutes(10)))
struct SocketsEndToEnd {
    private func connects(_ lab: Lab, to path: String) async -> Bool {
        let loop = lab.loop
        return await
            (try? loop.run {
                try await SocketChannel.connect(to: .unix(path: path), on: loop).close()
                return true
            }) ?? false
    }

    private func show(_ lab: Lab, _ side: String) async throws -> (text: String, listeners: [JSONValue]) {
        let text = try await lab.crossdock(["guest", "show", "web1", "--state-dir", lab.state(side)])
        let json = try await lab.crossdock(["guest", "show", "web1", "--json", "--state-dir", lab.state(side)])
        #expect(text.code == 0 && json.code == 0, "\(text.all)\(json.all)")
        return (text.output, try JSONValue(parsing: Array(json.output.utf8))["listeners"]?.array ?? [])
    }

    @Test func socketsAndLogsAreFoundUnderTheSamePathOnEachHost() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        let (serial, agent, log) = (
            lab.directory.file("serial.sock"), lab.directory.file("qga.sock"), lab.directory.file("out.log")
        )
        try await lab.startIdleGuest(
            disks: [disk],
            more: [
                "-serial", "unix:\(serial),server=on,wait=off", "-vnc", "unix:\(lab.directory.file("vnc.sock"))",
                "-chardev",
                "socket,id=qga0,path=\(agent),server=on,wait=off", "-device", "virtio-serial", "-device",
                "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0", "-parallel", "file:\(log)",
            ]
        )
        try await lab.startDestination("a")
        try await lab.startDestination()
        let names = ["serial.sock", "qga.sock", "vnc.sock"]
        func expect(_ side: String) async throws {
            let run = lab.guests(side).runDirectory(of: "web1")
            let shown = try await show(lab, side)
            for name in names {
                #expect(await connects(lab, to: "\(run)/\(name)"), "\(side): \(name)")
                #expect(shown.text.contains("\(run)/\(name)"), "\(side): \(shown.text)")
                #expect(
                    shown.listeners.contains { $0["stablePath"]?.string == "\(run)/\(name)" },
                    "\(side): \(shown.text)"
                )
            }
            #expect(DurableFile.exists("\(run)/out.log"))
        }
        try await expect("a")
        #expect(await connects(lab, to: serial))
        let away = try await lab.migrate()
        #expect(away.code == 0, "\(away.all)")
        try await expect("b")
        // What led to the places of its first start would have led its QEMU out of its own directory.
        let home = try await lab.migrate(from: "b")
        #expect(home.code == 0, "\(home.all)")
        try await expect("a")
        var status = stat()
        for name in names + ["out.log"] {
            #expect(lstat("\(lab.guests("a").runDirectory(of: "web1"))/\(name)", &status) == 0)
            #expect(status.st_mode & S_IFMT != S_IFLNK, "\(name) leads elsewhere")
        }
    }

    /// QEMU begins the file of a log anew, and a move that is rolled back takes with it what it has made.
    @Test func theLogOfAGuestsStayBeforeIsKept() async throws {
        let lab = try Lab(emulators: Lab.whole)
        let disk = try await lab.makeImage("disk.raw", megabytes: 32, data: 32)
        try await lab.startLinuxGuest(disks: [disk])
        try await lab.startDestination("a")
        try await lab.startDestination()
        let away = try await lab.migrate()
        #expect(away.code == 0, "\(away.all)")
        try await eventually("records on b") { try lab.records(lab.consoleB) > 5 }
        let home = try await lab.migrate(from: "b")
        #expect(home.code == 0, "\(home.all)")
        let log = try DurableFile.read(lab.consoleB)
        #expect(log?.isEmpty == false)

        let migration = try lab.beginMigration(more: ["--bandwidth", "1000000", "--format", "raw"])
        let before = "\(lab.guests("b").directory(of: "web1"))/run.before/console.log"
        try await eventually("the guest's QEMU on b") { DurableFile.exists(lab.consoleB) && DurableFile.exists(before) }
        migration.signal(SIGINT)
        #expect(try await migration.finish().code == MigrationError.Code.cancelled.rawValue)
        #expect(try DurableFile.read(lab.consoleB) == log)
        #expect(!DurableFile.exists(before))

        let again = try await lab.migrate()
        #expect(again.code == 0, "\(again.all)")
        #expect(try DurableFile.read(before) == log)
        try await eventually("records on b") { try lab.records(lab.consoleB) > 5 }
    }

    @Test func anAdoptedGuestHasThemToo() async throws {
        let lab = try Lab()
        let serial = lab.directory.file("serial.sock")
        let foreign = try await lab.startForeignGuest([
            "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-serial", "unix:\(serial),server=on,wait=off",
        ])
        let adopted = try await lab.crossdock([
            "guest", "adopt", "web1", "--qmp", lab.directory.file("foreign.sock"), "--state-dir", lab.state("a"),
        ])
        #expect(adopted.code == 0, "\(adopted.all)")
        let path = "\(lab.guests("a").runDirectory(of: "web1"))/serial.sock"
        #expect(await connects(lab, to: path))
        #expect(try await show(lab, "a").text.contains("on each host \(path)"))
        let removed = try await Tool.run(["kill", "\(foreign.pid)"])
        #expect(removed.code == 0)
    }
}
