import IO
import Migration
import TestSupport
import Testing

/// Hosts that are far from each other.
@Suite(.serialized, .timeLimit(.minutes(15)))
struct LongLineEndToEnd {
    /// Two hosts with a line of 20 ms there and back, and a Linux guest that writes.
    private func makeLab() async throws -> (lab: Lab, line: LongLine, credentials: [String]) {
        let lab = try Lab(emulators: Lab.whole)
        let directory = try lab.pki.issue("far", hosts: ["127.0.0.1", "127.0.0.3", "localhost"])
        let credentials = lab.credentials(directory)
        let control = try await lab.startDestination(credentials: credentials)
        let line = try await LongLine(
            from: "127.0.0.3",
            to: "127.0.0.1",
            ports: [control, lab.nbdPort],
            roundTrip: .milliseconds(20)
        )
        let disk = try await lab.makeImage("disk.raw", megabytes: 32, data: 4)
        try await lab.startLinuxGuest(disks: [disk])
        return (lab, line, credentials)
    }

    private func expectWhole(_ lab: Lab, _ report: MigrationReport) async throws {
        #expect(report.outcome == .migrated)
        #expect(report.disks[0].digestSource == report.disks[0].digestDestination)
        let before = try lab.records(lab.consoleB)
        try await eventually("the guest goes on writing") { try lab.records(lab.consoleB) > before + 20 }
    }

    @Test func severalConnectionsShareTheMemory() async throws {
        let (lab, line, credentials) = try await makeLab()
        defer { line.stop() }
        let report = lab.directory.file("report.json")
        let result = try await lab.migrate(host: "127.0.0.3", credentials: credentials, more: ["--report", report])
        #expect(result.code == 0, "\(result.all)")
        let written = try lab.report(report)
        // One for the messages, four for the memory, four for the disk.
        #expect(written.tls?.connections == 9)
        // Those that carried a share of the memory; the greetings of the others, and the disk, are smaller.
        #expect(try await line.sent().count { $0 > Int(written.ramBytesSent) / 16 } >= 3)
        try await expectWhole(lab, written)
    }

    @Test func aConnectionOfTheMemoryThatBreaksCostsAnAttempt() async throws {
        let (lab, line, credentials) = try await makeLab()
        defer { line.stop() }
        let report = lab.directory.file("report.json")
        let child = try ChildProcess(
            lab.crossdockOfA
                + lab.migrateCommand(
                    host: "127.0.0.3",
                    credentials: credentials,
                    more: ["--report", report, "--bandwidth", "20M", "--json"]
                )
        )
        try await child.wait(for: "the memory") { child.output.contains("\"phase\":\"memory\"") }
        let before = try await line.sent()
        var broken: Int?
        try await child.wait(for: "a share of the memory") {
            let sent = try await line.sent()
            // The disk's connections are older.
            broken = sent.indices.last { sent[$0] > 1 << 20 && $0 >= before.count - 4 }
            return broken != nil
        }
        try await line.cut(connection: try #require(broken))
        let result = try await child.finish(seconds: 120)
        #expect(result.code == 0, "\(result.all)")
        #expect(result.all.contains("sending it again"), "\(result.all)")
        try await expectWhole(lab, try lab.report(report))
    }
}
