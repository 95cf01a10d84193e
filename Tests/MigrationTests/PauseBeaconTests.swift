import Migration
import TestSupport
import Testing

struct PauseBeaconTests {
    @Test func othersYieldUntilItIsLoweredOrItsTimeIsOver() async throws {
        let lab = try TestDirectory()
        // Two processes of a host have the same file, each its own mapping.
        let paused = try PauseBeacon(lab.file("pause"))
        let other = try PauseBeacon(lab.file("pause"))
        #expect(!paused.isRaised && !other.isRaised)
        paused.raise(for: 600_000)
        #expect(other.isRaised && !paused.isRaised)
        // Who has not raised it lowers nothing.
        other.lower()
        #expect(other.isRaised)
        paused.lower()
        #expect(!other.isRaised)
        paused.raise(for: 0)
        try await eventually("its time is over") { !other.isRaised }
        paused.raise(for: 600_000)
        let later = try PauseBeacon(lab.file("pause"))
        #expect(later.isRaised)
    }
}
