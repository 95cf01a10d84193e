import NBD
import Testing

@testable import Migration

/// What a mirror knows of its line, and of what is not durable at its other end.
struct PathTests {
    private let start = ContinuousClock.now

    /// So many answers, one every millisecond, each after the same time.
    private func run(_ path: inout PathEstimate, answers: Int, bytes: Int, after time: Duration, from first: Int = 0) {
        for index in first..<(first + answers) {
            let now = start + .milliseconds(index)
            path.answered(bytes, sent: now - time, now: now)
        }
    }

    @Test func aLineHoldsItsRateTimesItsShortestAnswer() {
        var path = PathEstimate()
        #expect(path.product == 0)
        // 1 MiB a millisecond, 100 ms away.
        run(&path, answers: 1000, bytes: 1 << 20, after: .milliseconds(100))
        #expect(path.roundTrip == .milliseconds(100))
        #expect((90 << 20...110 << 20).contains(path.product), "\(path.product)")
        // What waits longer, behind what is under way, does not lengthen the line.
        run(&path, answers: 1000, bytes: 1 << 20, after: .milliseconds(400), from: 1000)
        #expect((90 << 20...110 << 20).contains(path.product), "\(path.product)")
        // A slower line holds less, once the last seconds have shown it.
        run(&path, answers: 6000, bytes: 1 << 17, after: .milliseconds(100), from: 2000)
        #expect((10 << 20...16 << 20).contains(path.product), "\(path.product)")
    }

    @Test func newConnectionsMayTakeAnotherWay() {
        var path = PathEstimate()
        run(&path, answers: 500, bytes: 1 << 20, after: .milliseconds(1))
        path.restart()
        #expect(path.roundTrip == nil && path.product == 0)
        run(&path, answers: 500, bytes: 1 << 20, after: .milliseconds(50), from: 500)
        #expect((45 << 20...55 << 20).contains(path.product), "\(path.product)")
    }

    private func change(_ id: UInt64) -> DiskChange {
        DiskChange(id, .trim, 0..<4096)
    }

    @Test func aFlushCoversWhatWasAcknowledgedBeforeItWasSent() {
        var retained = RetainedChanges()
        for id in 1...3 { retained.append(change(UInt64(id))) }
        let first = retained.beginFlush()
        retained.append(change(4))
        let second = retained.beginFlush()
        retained.append(change(5))
        #expect(retained.flushes == 2 && retained.count == 5 && retained.countUncovered == 1)
        // The later one is answered first, and covers what the earlier one does.
        #expect(retained.endFlush(second, isDurable: true) && retained.count == 1)
        #expect(retained.endFlush(first, isDurable: true) && retained.count == 1 && retained.flushes == 0)
        #expect(retained.takeAll().map(\.id) == [5])
    }

    @Test func whatALostFlushCoveredIsCoveredByTheNext() {
        var retained = RetainedChanges()
        retained.append(change(1))
        let lost = retained.beginFlush()
        #expect(!retained.endFlush(lost, isDurable: false) && retained.countUncovered == 1)
        #expect(retained.endFlush(retained.beginFlush(), isDurable: true) && retained.isEmpty)
    }

    @Test func anAnswerOfAnEarlierLifeMakesNothingDurable() {
        var retained = RetainedChanges()
        retained.append(change(1))
        let mark = retained.beginFlush()
        #expect(retained.takeAll().map(\.id) == [1])
        retained.append(change(1))
        #expect(!retained.endFlush(mark, isDurable: true) && retained.count == 1 && retained.flushes == 0)
    }
}
