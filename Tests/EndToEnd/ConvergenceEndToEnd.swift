import IO
import Migration
import TestSupport
import Testing

/// A guest that writes faster than the link carries it: `tc tbf` on the loopback of a network namespace.
@Suite(.serialized, .timeLimit(.minutes(30)))
struct ConvergenceEndToEnd {
    func expectNotConverged(_ lab: Lab, _ result: ToolResult, _ words: String) async throws {
        #expect(result.code == MigrationError.Code.notConverged.rawValue, "\(result.all)")
        #expect(result.errors.contains("did not converge"), "\(result.all)")
        #expect(result.errors.contains(words), "\(result.all)")
        #expect(result.errors.contains("MB/s"), "\(result.all)")
        #expect(try await lab.leftAtSource() == [])
        try await eventually("the destination has cleaned up") { try lab.leftAtDestination() == [] }
    }

    @Test func aGuestThatFillsItsDiskFasterThanTheLinkStaysAndKeepsWriting() async throws {
        let lab = try Lab(emulators: Lab.whole)
        try await lab.throttle("160mbit")
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 128, data: 1)
        try await lab.startLinuxGuest(disks: [disk], workload: "xd.fill=24")
        // What it writes shrinks, and would get through.
        let result = try await lab.migrate(more: ["--compress", "off"])
        try await expectNotConverged(lab, result, "writes to its disks faster")
        let before = try lab.records(lab.consoleA)
        try await eventually("the guest goes on writing") { try lab.records(lab.consoleA) > before + 20 }
    }

    @Test func aGuestThatDirtiesItsMemoryFasterThanTheLinkStaysAndKeepsWriting() async throws {
        let lab = try Lab(emulators: Lab.whole)
        // Half of the guest's time is enough to write ten times as much as this link carries, and of each page so much that what has changed
        // of them is more than fits the pause as well.
        try await lab.throttle("80mbit")
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
        try await lab.startLinuxGuest(disks: [disk], workload: "xd.dirty=32 xd.interval=200000")
        let result = try await lab.migrate(more: ["--slow-down", "50", "--compress", "off"])
        try await expectNotConverged(lab, result, "writes to its memory faster")
        #expect(result.errors.contains("slowing the guest down"), "\(result.all)")
        #expect(result.errors.contains("allow more with --slow-down"), "\(result.all)")
        let before = try lab.records(lab.consoleA)
        try await eventually("the guest goes on writing") { try lab.records(lab.consoleA) > before + 10 }
    }

    @Test func whatShrinksTakesLessOfASlowLine() async throws {
        let lab = try Lab(emulators: Lab.whole)
        try await lab.throttle("80mbit")
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 1)
        let filled = try await Tool.run(
            ["qemu-io", "-f", "raw"] + (8..<64).flatMap { ["-c", "write -P \($0) \($0)M 1M"] } + [disk]
        )
        #expect(filled.code == 0)
        try await lab.startLinuxGuest(disks: [disk])
        let report = lab.directory.file("report.json")
        // What a busy machine measures of the line decides nothing then.
        let result = try await lab.migrate(more: ["--compress", "1", "--report", report])
        #expect(result.code == 0 && result.output.contains("compressed to"), "\(result.all)")
        let written = try lab.report(report)
        let sent = try #require(written.disks.first)
        #expect(sent.digestSource == sent.digestDestination)
        #expect(try #require(sent.bytesOnLine) < sent.bytesSent / 2, "\(sent)")
        #expect(try #require(written.ramBytesOnLine) < written.ramBytesSent / 10 * 9, "\(written.ramBytesSent)")
        let before = try lab.records(lab.consoleB)
        try await eventually("the guest goes on writing") { try lab.records(lab.consoleB) > before + 10 }
    }

    @Test func aGuestThatChangesTheSamePagesAgainAndAgainGetsThrough() async throws {
        let lab = try Lab(emulators: Lab.whole)
        try await lab.throttle("80mbit")
        try await lab.startDestination()
        let disk = try await lab.makeImage("disk.raw", megabytes: 32, data: 16)
        // A word of each page: all of it would take twice the time in which it is changed again.
        try await lab.startLinuxGuest(disks: [disk], workload: "xd.pages=12 xd.interval=200000")
        let report = lab.directory.file("report.json")
        let result = try await lab.migrate(more: ["--compress", "off", "--slow-down", "0", "--report", report])
        #expect(result.code == 0, "\(result.all)")
        #expect(try lab.report(report).deltaCacheBytes != nil)
        let before = try lab.records(lab.consoleB)
        try await eventually("the guest goes on writing") { try lab.records(lab.consoleB) > before + 10 }
    }
}
