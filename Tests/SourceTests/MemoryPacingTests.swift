import Testing

@testable import Source

/// What QEMU is told while it sends the memory of a guest that writes.
struct MemoryPacingTests {
    private let start = ContinuousClock.now

    private func look(
        disks: UInt64 = 0,
        fit: Bool = true,
        away: Bool = false,
        remaining: UInt64 = 1000,
        rounds: Int = 1,
        dirty: Double = 0,
        rate: Double = 16_000_000,
        yield: Double = 1
    ) -> MemoryPacing.Look {
        .init(
            remaining: remaining,
            rounds: rounds,
            rate: rate,
            steadyRate: 16_000_000,
            yield: yield,
            dirtyRate: dirty,
            disks: disks,
            disksFit: fit,
            isAway: away
        )
    }

    @Test func theGateIsOpenWhileTheDisksFitAndTheDestinationIsThere() {
        var pacing = MemoryPacing(mostSlowDown: 99, hasFewPasses: false)
        #expect(!pacing.gateIsOpen)
        #expect(pacing.take(look(), now: start) == [.gate(share: 0.1)])
        #expect(pacing.take(look(), now: start) == [])
        #expect(pacing.take(look(fit: false), now: start) == [.gate(share: 0)])
        #expect(pacing.take(look(), now: start) == [.gate(share: 0.1)])
        #expect(pacing.take(look(away: true), now: start) == [.gate(share: 0)])
    }

    @Test func theShortestPauseThatIsEnoughIsUsed() {
        var pacing = MemoryPacing(mostSlowDown: 99, hasFewPasses: false)
        var orders: [MemoryPacing.Order] = []
        // QEMU goes through the memory again and again, and the guest is not paused.
        for round in 1..<7 {
            for _ in 0..<3 { orders += pacing.take(look(rounds: round), now: start) }
        }
        #expect(
            orders == [
                .gate(share: 0.1), .gate(share: 0.2), .gate(share: 0.4), .gate(share: 0.8), .gate(share: 1),
            ]
        )
        // What was not enough is not tried again after an outage.
        orders = pacing.take(look(away: true, rounds: 6), now: start) + pacing.take(look(rounds: 6), now: start)
        #expect(orders == [.gate(share: 0), .gate(share: 1)])
    }

    @Test func aGuestOfWhichDifferencesAreSentIsPausedByWhatTheyTake() {
        var pacing = MemoryPacing(mostSlowDown: 0, hasFewPasses: true)
        #expect(pacing.take(look(), now: start) == [.gate(share: 1)])
        #expect(pacing.take(look(yield: 0.25), now: start) == [.gate(share: 4)])
        #expect(pacing.take(look(yield: 0.24), now: start) == [])
        #expect(pacing.take(look(fit: false, yield: 0.25), now: start) == [.gate(share: 0)])
    }

    @Test func disksThatFallBehindGetTheLine() {
        var pacing = MemoryPacing(mostSlowDown: 99, hasFewPasses: false)
        var speeds: [MemoryPacing.Order] = []
        for second in 0..<8 {
            let disks = UInt64(1_000_000 + 500_000 * second)
            speeds += pacing.take(look(disks: disks, fit: false), now: start + .seconds(second))
        }
        #expect(
            speeds == [.speed(8_000_000), .speed(4_000_000), .speed(2_000_000), .speed(1_000_000)],
            "the memory keeps a sixteenth"
        )
    }

    @Test func theMemoryTakesTheLineBackStepByStep() {
        var pacing = MemoryPacing(mostSlowDown: 99, hasFewPasses: false)
        _ = pacing.take(look(disks: 1000, fit: false), now: start)
        #expect(pacing.take(look(disks: 2000, fit: false), now: start + .seconds(1)) == [.speed(8_000_000)])
        var orders: [MemoryPacing.Order] = []
        for second in 2..<8 { orders += pacing.take(look(), now: start + .seconds(second)) }
        #expect(
            orders == [
                .gate(share: 0.1), .speed(10_000_000), .speed(12_500_000), .speed(15_625_000), .speed(nil),
            ]
        )
    }

    @Test func disksThatGetOnByThemselvesNeedNoHelp() {
        var pacing = MemoryPacing(mostSlowDown: 99, hasFewPasses: false)
        var disks: UInt64 = 1 << 40
        for second in 0..<20 {
            #expect(pacing.take(look(disks: disks, fit: false), now: start + .seconds(second)) == [])
            disks /= 2
        }
    }

    @Test func aMomentIsNoReason() {
        var pacing = MemoryPacing(mostSlowDown: 99, hasFewPasses: false)
        for step in 0..<40 {
            let orders = pacing.take(look(disks: 1 << 30, fit: step % 4 != 0), now: start + .milliseconds(300 * step))
            #expect(!orders.contains { if case .speed = $0 { true } else { false } })
        }
    }

    @Test func anOutageChangesNothing() {
        var pacing = MemoryPacing(mostSlowDown: 99, hasFewPasses: false)
        for second in 0..<10 {
            #expect(pacing.take(look(disks: 1 << 30, fit: false, away: true), now: start + .seconds(second)) == [])
        }
    }

    @Test(arguments: [(0.0, 20), (17_000_000, 24), (32_000_000, 60), (1e12, 90)])
    func aGuestIsSlowedDownByWhatIsMissing(dirty: Double, percent: Int) {
        var pacing = MemoryPacing(mostSlowDown: 99, hasFewPasses: false)
        _ = pacing.take(look(rounds: 0), now: start)
        var orders: [MemoryPacing.Order] = []
        for round in 1..<20 where orders.isEmpty {
            orders = pacing.take(look(rounds: round, dirty: dirty), now: start).filter { !$0.isGate }
        }
        #expect(orders == [.slowDown(percent: percent)])
        for round in 20..<100 {
            orders = pacing.take(look(rounds: round, dirty: dirty), now: start)
            if !orders.isEmpty { break }
        }
        #expect(orders == [.giveUp])
    }

    @Test func aGuestThatMayBeSlowedDownALittleIsSlowedDownALittle() {
        #expect(orders(mostSlowDown: 30, dirty: 1e12) == [.slowDown(percent: 30), .giveUp])
        #expect(orders(mostSlowDown: 0, dirty: 1e12) == [.giveUp])
    }

    @Test func aGuestThatNowWritesMoreAndNowLessDoesNotGetOn() {
        let remaining: [UInt64] = [1000, 800, 1000, 700, 900, 750]
        #expect(orders(mostSlowDown: 99, dirty: 0, remaining: remaining) == [.slowDown(percent: 20), .giveUp])
    }

    /// What is ordered besides the gate in many passes.
    private func orders(mostSlowDown: Int, dirty: Double, remaining: [UInt64] = [1000]) -> [MemoryPacing.Order] {
        var pacing = MemoryPacing(mostSlowDown: mostSlowDown, hasFewPasses: false)
        var orders: [MemoryPacing.Order] = []
        for round in 0..<100 where orders.last != .giveUp {
            let left = remaining[round % remaining.count]
            orders += pacing.take(look(remaining: left, rounds: round, dirty: dirty), now: start).filter { !$0.isGate }
        }
        return orders
    }

    @Test func whatOnlyFillsBuffersMakesNoPauseLonger() {
        var pacing = MemoryPacing(mostSlowDown: 99, hasFewPasses: true)
        #expect(pacing.take(look(), now: start) == [.gate(share: 1)])
        // QEMU has seen four times what comes through; what it sees next it may forget.
        #expect(pacing.take(look(rate: 64_000_000), now: start) == [.gate(share: 0.25)])
        #expect(pacing.take(look(rate: 8_000_000), now: start) == [])
        var orders: [MemoryPacing.Order] = []
        for _ in 0..<10 { orders += pacing.take(look(), now: start) }
        #expect(orders == [.gate(share: 1)])
    }

    @Test func aQEMUThatLosesWritesGoesThroughTheMemoryOnce() {
        var pacing = MemoryPacing(mostSlowDown: 99, hasFewPasses: true)
        #expect(pacing.take(look(), now: start) == [.gate(share: 1)])
    }

    @Test func aGuestWhoseRestShrinksIsLeftAlone() {
        var pacing = MemoryPacing(mostSlowDown: 99, hasFewPasses: false)
        _ = pacing.take(look(rounds: 0), now: start)
        var remaining: UInt64 = 1 << 40
        for round in 1..<30 {
            let orders = pacing.take(look(remaining: remaining, rounds: round, dirty: 1e9), now: start)
            let others = orders.filter { !$0.isGate }
            #expect(others == [])
            remaining = remaining / 10 * 8
        }
    }
}

extension MemoryPacing.Order {
    fileprivate var isGate: Bool { if case .gate = self { true } else { false } }
}
