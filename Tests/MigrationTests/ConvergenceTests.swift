import Migration
import Testing

struct ConvergenceTests {
    /// Feeds remainders at one a second, at a rate that makes every round one second long; the index of the verdict.
    func verdict(_ remainders: [UInt64]) -> Int? {
        var convergence = Convergence()
        let start = ContinuousClock.now
        for (index, remaining) in remainders.enumerated() {
            let now = start + .milliseconds(1001 * index)
            if convergence.hasFailed(remaining: remaining, rate: 1e12, now: now) { return index }
        }
        return nil
    }

    @Test func aShrinkingRemainderConverges() {
        #expect(verdict((0..<40).map { UInt64(1_000_000) >> UInt64($0 / 2) + 1 }) == nil)
    }

    @Test func aConstantRemainderFailsAfterTheStatedRounds() {
        #expect(verdict(Array(repeating: 1000, count: 40)) == Convergence.patience)
    }

    @Test func goingUpAndDownAroundTheSameValueIsNoProgress() {
        #expect(verdict((0..<40).map { $0 % 2 == 0 ? 1000 : 850 }) == Convergence.patience + 1)
    }

    @Test func aRateThatIsNotKnownAtFirstDoesNotStretchTheFirstRound() {
        var convergence = Convergence()
        let start = ContinuousClock.now
        var failedAfter: Int?
        for second in 0..<60 where failedAfter == nil {
            let rate = second == 0 ? 0 : 1e12
            if convergence.hasFailed(remaining: 1 << 30, rate: rate, now: start + .milliseconds(1001 * second)) {
                failedAfter = second
            }
        }
        #expect(failedAfter.map { $0 < 15 } == true)
    }

    @Test func progressNowAndThenIsProgress() {
        #expect(verdict([1000, 1000, 1000, 1000, 800, 800, 800, 800, 600, 600, 600, 600, 400, 400]) == nil)
    }
}
