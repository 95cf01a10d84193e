import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import TestSupport
import Testing

/// What a migration says of how far it is, while it is.
@Suite(.serialized, .timeLimit(.minutes(10)))
struct ProgressEndToEnd {
    /// The events of a migration that was asked for them.
    private func events(_ result: ToolResult) -> [MigrationEvent] {
        result.output.split(separator: "\n").compactMap { MigrationEvent(parsing: Array($0.utf8)) }
    }

    private func progress(_ events: [MigrationEvent], _ phase: String) -> [MigrationEvent] {
        events.filter { $0.event == "progress" && $0.phase == phase }
    }

    @Test func aLimitedCopyOfASmallDiskIsCountedAsItArrives() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 12)
        try await lab.startIdleGuest(disks: [disk])
        try await lab.startDestination()
        let moved = try await lab.migrate(more: ["--json", "--bandwidth", "4M"])
        #expect(moved.code == 0, "\(moved.all)")
        let disks = progress(events(moved), "disks")
        let first = try #require(disks.first)
        // All of it fits into what QEMU and the relay have under way by themselves.
        #expect((first.percent ?? 100) < 90, "\(moved.output)")
        #expect((first.rate ?? 0) > 0, "\(moved.output)")
        let middle = disks.filter { $0.percent.map { $0 > 0 && $0 < 100 } ?? false }
        #expect(middle.count > 3, "\(moved.output)")
        #expect(middle.allSatisfy { $0.remaining != nil }, "\(moved.output)")
        // Nobody writes: nothing is taken back.
        for (one, next) in zip(disks, disks.dropFirst()) {
            #expect((one.percent ?? 0) <= (next.percent ?? 0), "\(moved.output)")
        }
    }

    @Test func anAgentThatIsReplacedTakesNothingBackButWhatMayBeLost() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.raw", megabytes: 64, data: 24)
        try await lab.startIdleGuest(disks: [disk])
        try await lab.startDestination()
        let move = try lab.beginMigration(more: ["--json", "--bandwidth", "4M"])
        func seen() -> [MigrationEvent] {
            progress(move.output.split(separator: "\n").compactMap { MigrationEvent(parsing: Array($0.utf8)) }, "disks")
        }
        try await eventually(seconds: 60, "a third has been copied") { seen().contains { ($0.percent ?? 0) > 33 } }
        try await lab.replaceDestination()
        let result = try await move.finish(seconds: 120)
        #expect(result.code == 0, "\(result.all)")
        let disks = progress(events(result), "disks")
        let before = try #require(disks.firstIndex { ($0.percent ?? 0) > 33 })
        // 8 MiB of 24 may not have been durable there.
        #expect(disks[before...].allSatisfy { ($0.percent ?? 0) > 0 }, "\(result.output)")
    }

    @Test func theReadingBackIsCounted() async throws {
        let lab = try Lab()
        let disk = try await lab.makeImage("disk.qcow2", megabytes: 256, data: 96)
        try await lab.startIdleGuest(disks: [disk])
        try await lab.startDestination()
        // What goes through QEMU is not read back while it is written.
        let moved = try await lab.migrate(more: ["--json", "--format", "qcow2"])
        #expect(moved.code == 0, "\(moved.all)")
        let verify = progress(events(moved), "verify")
        #expect(!verify.isEmpty, "\(moved.output)")
        #expect(verify.allSatisfy { $0.percent.map { (0...100).contains($0) } ?? false }, "\(moved.output)")
    }
}
