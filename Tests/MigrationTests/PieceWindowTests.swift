import IO
import Testing

@testable import Migration

/// How much of the memory may be under way.
struct PieceWindowTests {
    private static let piece = StreamPiece.largest
    private let start = ContinuousClock.now

    @Test func alwaysOnePieceMayGo() throws {
        var window = PieceWindow()
        #expect(window.hasRoom(PieceWindow.least * 4))
        window.send(PieceWindow.least * 4, now: start)
        #expect(!window.hasRoom(1))
        try window.pass(1, now: start + .milliseconds(1))
        #expect(window.hasRoom(PieceWindow.least * 4))
    }

    @Test func aLineThatIsNotKnownGetsLittle() {
        var window = PieceWindow()
        var sent = 0
        while window.hasRoom(Self.piece) {
            window.send(Self.piece, now: start)
            sent += Self.piece
        }
        #expect(sent == PieceWindow.least)
    }

    /// Sends what may be sent over a line that carries so much a second and takes so long; what is under way at the end.
    private func fill(_ rate: Double, roundTrip: Duration, for time: Duration) throws -> (
        window: PieceWindow, highest: Int
    ) {
        var window = PieceWindow()
        var now = start
        var free = start
        var arrivals: [ContinuousClock.Instant] = []
        var highest = 0
        while now < start + time {
            while window.hasRoom(Self.piece) {
                window.send(Self.piece, now: now)
                // The line takes one after another, and what it says comes back a round trip later.
                free = max(free, now) + .seconds(Double(Self.piece) / rate)
                arrivals.append(free + roundTrip)
            }
            highest = max(highest, window.bytes)
            now = arrivals[Int(window.passed)]
            try window.pass(window.passed + 1, now: now)
        }
        return (window, highest)
    }

    @Test func aLongLineIsKeptFullAndNotMoreThanTwice() throws {
        let (rate, roundTrip) = (200e6, Duration.milliseconds(100))
        let (window, highest) = try fill(rate, roundTrip: roundTrip, for: .seconds(5))
        let product = rate * 0.1
        #expect(Double(window.limit) > product, "the line would run dry")
        #expect(Double(highest) < product * 3, "\(highest)")
    }

    @Test func aSlowOtherEndIsNotGivenMoreThanItTakes() throws {
        // As an open line on which the other end is the slowest: it takes 50 MB/s.
        let (window, highest) = try fill(50e6, roundTrip: .milliseconds(20), for: .seconds(10))
        #expect(highest <= PieceWindow.least + Self.piece, "\(highest)")
        #expect(window.limit >= PieceWindow.least)
    }

    @Test func whatTheLineTakesIsSeenOnlyWhileMoreIsWaiting() throws {
        var window = PieceWindow()
        /// Sends pieces of which 1 MB/s arrive, and that wait for so long.
        func send(_ count: Int, from begin: Int, waiting time: Duration, _ window: inout PieceWindow) throws {
            for step in begin..<(begin + count) {
                window.waited(time)
                window.send(100_000, now: start + .milliseconds(100 * step))
                window.shrink(window.passed, to: 50_000)
                #expect(window.bytes == 50_000)
                try window.pass(window.passed + 1, now: start + .milliseconds(100 * step + 50))
            }
        }
        try send(5, from: 0, waiting: .milliseconds(40), &window)
        #expect(window.lineRate == nil)
        try send(5, from: 5, waiting: .milliseconds(60), &window)
        #expect(window.lineRate.map { abs($0 - 500_000) < 1000 } == true, "\(window.lineRate ?? 0)")
        // One that was passed on is not under way, nor one that was never sent.
        window.shrink(0, to: 1)
        window.shrink(100, to: 1)
        #expect(window.bytes == 0)
    }

    @Test func aLineThatOthersHaveSeenIsFilledAtOnceAndOnlyIfItIsAsTheySay() throws {
        var window = PieceWindow(PathEstimate(rate: 500e6, roundTrip: .milliseconds(200)))
        #expect(window.limit == 150_000_000)
        // What it takes now is seen soon: a tenth of that, and half of the round trip.
        for step in 0..<400 {
            window.send(500_000, now: start + .milliseconds(10 * step))
            try window.pass(window.passed + 1, now: start + .milliseconds(10 * step + 100))
        }
        #expect((7_400_000...7_600_000).contains(window.limit), "\(window.limit)")
    }

    @Test func numbersOnlyRise() throws {
        var window = PieceWindow()
        for _ in 0..<3 { window.send(10, now: start) }
        try window.pass(2, now: start)
        try window.pass(2, now: start)
        #expect(window.bytes == 10)
        #expect(throws: ChannelError.self) { try window.pass(1) }
        #expect(throws: ChannelError.self) { try window.pass(4) }
        #expect(throws: ChannelError.self) { try window.pass(.max) }
        #expect(window.bytes == 10)
        try window.pass(3, now: start)
        #expect(window.bytes == 0)
    }

    @Test func aLongStreamKeepsNothingOfWhatIsOver() throws {
        var window = PieceWindow()
        for number in 1...10_000 {
            window.send(1000, now: start)
            try window.pass(UInt64(number), now: start)
        }
        #expect(window.bytes == 0 && window.passed == 10_000)
    }
}
