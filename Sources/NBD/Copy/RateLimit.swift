internal import IO

/// Bounds a rate: says how long to wait before so many bytes may be moved.
public final class RateLimit: Sendable {
    private struct State {
        var rate: Double
        /// When all that was granted so far is paid for.
        var paid = ContinuousClock.now
    }
    private let state: Guarded<State>

    /// Makes a bound of at least one byte a second.
    public init(bytesPerSecond: UInt64) { state = Guarded(State(rate: Self.rate(bytesPerSecond))) }

    private static func rate(_ bytesPerSecond: UInt64) -> Double { Double(max(bytesPerSecond, 1)) }

    /// Changes the bound for what is granted from now on.
    public func change(to bytesPerSecond: UInt64) { state.withLock { $0.rate = Self.rate(bytesPerSecond) } }

    /// Grants bytes; the caller sleeps for the result before it moves them.
    public func take(_ count: Int) -> Duration {
        state.withLock { state in
            let now = ContinuousClock.now
            // A pause does not save up for a burst of more than a tenth of a second.
            let start = max(state.paid, now - .milliseconds(100))
            state.paid = start + .seconds(Double(count) / state.rate)
            return max(.zero, start - now)
        }
    }
}
