internal import IO

/// Bounds a rate: says how long to wait before so many bytes may be moved.
public final class RateLimit: Sendable {
    private let rate: Double
    /// When all that was granted so far is paid for.
    private let paid = Guarded(ContinuousClock.now)

    /// Makes a bound of at least one byte a second.
    public init(bytesPerSecond: UInt64) { rate = Double(max(bytesPerSecond, 1)) }

    /// Grants bytes; the caller sleeps for the result before it moves them.
    public func take(_ count: Int) -> Duration {
        paid.withLock { paid in
            let now = ContinuousClock.now
            // A pause does not save up for a burst of more than a tenth of a second.
            let start = max(paid, now - .milliseconds(100))
            paid = start + .seconds(Double(count) / rate)
            return max(.zero, start - now)
        }
    }
}
