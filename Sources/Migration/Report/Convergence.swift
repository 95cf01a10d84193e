/// Decides whether work that somebody keeps adding to will ever be done.
///
/// A round ends when as much time has passed as the remainder at its beginning needed at the measured rate, at least
/// one second. A round that does not bring the remainder a tenth below the lowest one so far counts against the
/// migration; several in a row end it. The lowest one is the measure, because a remainder that goes up and down around
/// the same value is not progress.
public struct Convergence: Sendable {
    /// How many such rounds in a row are too many.
    public static let patience = 5

    private var lowest: UInt64?
    private var roundEnd: ContinuousClock.Instant = .now
    /// Rounds in a row that brought nothing.
    public private(set) var idleRounds = 0

    /// Makes a judge at the beginning of the first round.
    public init() {}

    /// Takes a measurement.
    ///
    /// - Parameters:
    ///   - remaining: bytes still to do.
    ///   - rate: bytes per second.
    ///   - now: when it was measured.
    /// - Returns: whether the work will not be done at this rate.
    public mutating func hasFailed(
        remaining: UInt64,
        rate: Double,
        now: ContinuousClock.Instant = .now
    ) -> Bool {
        guard let before = lowest else {
            lowest = remaining
            begin(remaining, rate, now)
            return false
        }
        guard now >= roundEnd else { return false }
        idleRounds = Double(remaining) < Double(before) * 0.9 ? 0 : idleRounds + 1
        lowest = min(before, remaining)
        begin(remaining, rate, now)
        return idleRounds >= Self.patience
    }

    /// Forgets the rounds, as when the remainder fits at last.
    public mutating func reset() {
        lowest = nil
        idleRounds = 0
    }

    private mutating func begin(_ remaining: UInt64, _ rate: Double, _ now: ContinuousClock.Instant) {
        // Without a rate there is nothing to go by: a link that carries nothing is given a few seconds a round.
        let seconds = rate > 0 ? min(max(Double(remaining) / rate, 1), 600) : 5
        roundEnd = now + .milliseconds(Int(seconds * 1000))
    }
}
