import Testing

@testable import Migration

/// When a mirror makes more connections.
struct LaneGrowthTests {
    private let start = ContinuousClock.now

    /// Ten observations a second, at a rate that depends on how many connections there are. Returns their number after so many seconds.
    private func run(
        _ growth: inout LaneGrowth,
        seconds: Int,
        from count: Int,
        isWanted: Bool = true,
        rate: (Int) -> Double
    ) -> Int {
        var (count, bytes) = (count, 0.0)
        for tenth in 0..<(seconds * 10) {
            count += growth.observe(
                UInt64(bytes),
                isWanted: isWanted,
                count: count,
                roundTrip: .milliseconds(50),
                now: start + .milliseconds(100 * tenth)
            )
            bytes += rate(count) / 10
        }
        return count
    }

    @Test func connectionsAreMadeAsLongAsTheyCarryMore() {
        var growth = LaneGrowth(atMost: 64)
        // Each carries 40 MB/s, the line 300.
        let count = run(&growth, seconds: 20, from: 4) { min(Double($0) * 40e6, 300e6) }
        #expect(count == 16)
    }

    @Test func oneTryIsMadeWhereTheLineIsTheLimit() {
        var growth = LaneGrowth(atMost: 64)
        #expect(run(&growth, seconds: 25, from: 4) { _ in 100e6 } == 8)
        // Another one after a while: what shared the line may have left it.
        var later = LaneGrowth(atMost: 64)
        #expect(run(&later, seconds: 40, from: 4) { _ in 100e6 } == 16)
    }

    @Test func thereAreNeverMoreThanWereAllowed() {
        var growth = LaneGrowth(atMost: 6)
        #expect(run(&growth, seconds: 60, from: 4) { Double($0) * 40e6 } == 6)
        #expect(!growth.mayExceed(6) && growth.mayExceed(5))
        var none = LaneGrowth(atMost: 0)
        #expect(run(&none, seconds: 10, from: 4) { Double($0) * 40e6 } == 4)
    }

    @Test func whatIsNotWantedIsNoReasonForMore() {
        var growth = LaneGrowth(atMost: 64)
        #expect(run(&growth, seconds: 20, from: 4, isWanted: false) { Double($0) * 40e6 } == 4)
    }

    @Test func lostConnectionsAreNotFollowedByMoreAtOnce() {
        var growth = LaneGrowth(atMost: 64)
        growth.forget(0, now: start)
        #expect(run(&growth, seconds: 20, from: 4) { Double($0) * 40e6 } == 4)
    }
}
