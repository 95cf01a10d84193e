import Testing

@testable import Emulator
@testable import Source

/// When QEMU sends what has changed of a page.
struct DeltaCacheTests {
    @Test(
        arguments: [
            // A guest that changes little, on any line.
            (1e6, 10e6, 1 << 30, nil),
            (0, 10e6, 1 << 30, nil),
            // A line that was not measured, and one that is fast.
            (50e6, 0, 1 << 30, nil),
            (300e6, 1e9, 8 << 30, nil),
            // Eight times what is changed in a second, up to half of the memory and the most.
            (2e6, 5e6, 1 << 30, 16 << 20),
            (5e6, 10e6, 1 << 30, 64 << 20),
            (16_777_216, 25e6, 1 << 30, 128 << 20),
            (12e6, 10e6, 256 << 20, 128 << 20),
            (100e6, 100e6, 4 << 30, 512 << 20),
            // What is changed would take more than a quarter of the memory, or than the most.
            (100e6, 100e6, 512 << 20, nil),
            (500e6, 100e6, 64 << 30, nil),
            (12e6, 10e6, 32 << 20, nil),
            (1e300, 10e6, 1 << 40, nil),
        ] as [(Double, Double, UInt64, UInt64?)]
    )
    func itIsAsLargeAsWhatTheGuestChanges(dirty: Double, line: Double, memory: UInt64, bytes: UInt64?) {
        #expect(DeltaCache(dirtyRate: dirty, lineRate: line, memory: memory)?.bytes == bytes)
    }
}

/// At how many pages QEMU looks to tell how fast a guest changes its memory.
struct DirtyRateTests {
    @Test(
        arguments: [
            // A GiB's share of two thousand pages, within what QEMU takes.
            (0, 4096), (256 << 20, 4096), (1 << 30, 2048), (2 << 30, 1024), (4 << 30, 512), (1 << 40, 512), (.max, 512),
        ] as [(UInt64, Int)]
    )
    func aSmallGuestIsLookedAtMoreClosely(_ memory: UInt64, _ pages: Int) {
        #expect(DirtyRate.samples(memory: memory) == pages)
    }
}

/// How much less is sent than the pages have.
struct DeltaYieldTests {
    private func state(_ rounds: Int, sent: UInt64, processed: UInt64) -> MigrationState {
        .init(
            status: "active",
            transferred: sent,
            remaining: 0,
            total: 0,
            processed: processed,
            rounds: rounds,
            megabitsPerSecond: 0,
            throttle: 0
        )
    }

    @Test func itIsTheWorseOfTheLastTwoPassesAndSomethingToSpare() {
        var yield = DeltaYield()
        #expect(yield.share == 1)
        yield.add(state(1, sent: 0, processed: 0))
        // Of the first pass most was empty.
        yield.add(state(2, sent: 100 << 20, processed: 1 << 30))
        yield.add(state(2, sent: 101 << 20, processed: 1 << 30))
        #expect(yield.share == 1)
        yield.add(state(3, sent: 110 << 20, processed: (1 << 30) + 10 << 20))
        #expect(yield.share == 1)
        yield.add(state(5, sent: 111 << 20, processed: (1 << 30) + 20 << 20))
        #expect(yield.share == 1)
        yield.add(state(6, sent: 113 << 20, processed: (1 << 30) + 30 << 20))
        #expect(yield.share == 0.25)
        yield.add(state(7, sent: 113 << 20, processed: (1 << 30) + 40 << 20))
        yield.add(state(8, sent: 113 << 20, processed: (1 << 30) + 50 << 20))
        #expect(yield.share == 1.0 / 32)
    }

    @Test func aPassOverNothingAndAnotherMigrationTellNothing() {
        var yield = DeltaYield()
        yield.add(state(2, sent: 10 << 20, processed: 10 << 20))
        for round in 3..<9 { yield.add(state(round, sent: 10 << 20, processed: 10 << 20 + 4096)) }
        yield.add(state(9, sent: 0, processed: 20 << 20))
        #expect(yield.share == 1)
    }
}

/// The speed of something that is counted now and then.
struct RateMeterTests {
    @Test func whatStandsStillForSecondsIsShownWithoutARate() {
        var meter = RateMeter()
        let start = ContinuousClock.now
        for step in 0...20 { meter.add(UInt64(step * 100_000), now: start + .milliseconds(100 * step)) }
        #expect((900_000...1_100_000).contains(meter.shown))
        for step in 21...30 { meter.add(2_000_000, now: start + .milliseconds(100 * step)) }
        #expect(meter.shown > 0, "a second is a hiccup")
        for step in 31...90 { meter.add(2_000_000, now: start + .milliseconds(100 * step)) }
        #expect(meter.shown == 0 && meter.rate > 0)
        meter.add(2_100_000, now: start + .milliseconds(9100))
        #expect(meter.shown > 50_000)
    }
}
