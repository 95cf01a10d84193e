/// How many connections carry a disk: more are tried as long as they carry more.
///
/// What one connection carries in a round trip is bounded by its window, and after a loss by what TCP makes of that; several have several
/// windows. Beyond what the line carries they only cost, so each try has to show that it is worth it.
struct LaneGrowth {
    /// Over how long a rate is taken at least.
    static let period = Duration.seconds(1)
    /// Over how many round trips at least: a new connection takes some to open its window.
    static let roundTrips = 10
    /// How much more has to come through after a try, for another one.
    static let gain = 1.1
    /// How long nothing more is tried after a try that was of no use: what shares the line may have left it.
    static let rest = Duration.seconds(30)

    private let atMost: Int
    /// The rate before the last try, in bytes per second; nil when none was made.
    private var former: Double?
    private var began: ContinuousClock.Instant?
    private var bytesThen: UInt64 = 0
    private var restsUntil: ContinuousClock.Instant?

    /// - Parameter atMost: how many there may be.
    init(atMost: Int) { self.atMost = atMost }

    /// Whether there may ever be more than so many.
    func mayExceed(_ count: Int) -> Bool { atMost > count }

    /// What is seen at a moment: called as often as one likes.
    ///
    /// - Parameters:
    ///   - bytes: what has come through since the beginning.
    ///   - isWanted: whether more waits than the connections take. A period in which it once did not says nothing of the line.
    ///   - count: how many connections there are.
    ///   - roundTrip: of the line.
    /// - Returns: how many more are to be made.
    mutating func observe(
        _ bytes: UInt64,
        isWanted: Bool,
        count: Int,
        roundTrip: Duration,
        now: ContinuousClock.Instant
    ) -> Int {
        guard isWanted, let began else {
            restart(bytes, now)
            return 0
        }
        let passed = now - began
        guard passed >= max(Self.period, roundTrip * Self.roundTrips) else { return 0 }
        let rate = Double(bytes &- bytesThen) / (passed / .seconds(1))
        restart(bytes, now)
        if let restsUntil, now < restsUntil { return 0 }
        restsUntil = nil
        if let former, rate < former * Self.gain {
            self.former = nil
            restsUntil = now + Self.rest
            return 0
        }
        guard count < atMost else { return 0 }
        former = rate
        return min(count, atMost - count)
    }

    /// The connections were lost, or could not be made: what was seen of them counts no more.
    mutating func forget(_ bytes: UInt64, now: ContinuousClock.Instant) {
        former = nil
        restsUntil = now + Self.rest
        restart(bytes, now)
    }

    private mutating func restart(_ bytes: UInt64, _ now: ContinuousClock.Instant) {
        began = now
        bytesThen = bytes
    }
}
