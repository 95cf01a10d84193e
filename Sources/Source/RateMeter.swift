/// The speed of something that is counted now and then.
struct RateMeter {
    private var last: (instant: ContinuousClock.Instant, count: UInt64)?
    /// Per second, smoothed over about a second.
    private(set) var rate = 0.0
    /// The part of its peak from which on the rate of something that stands still is 0: after some 5 s.
    private static let standstill = 1.0 / 128
    private var isStill = false
    /// What people are shown: what has stood still for seconds has no rate, however small the average becomes.
    var shown: Double { isStill && rate < peak * Self.standstill ? 0 : rate }
    /// The highest smoothed value.
    private(set) var peak = 0.0

    mutating func add(_ count: UInt64, now: ContinuousClock.Instant = .now) {
        if let last, now > last.instant {
            let parts = (now - last.instant).components
            let seconds = Double(parts.seconds) + Double(parts.attoseconds) / 1e18
            guard seconds > 0.02 else { return }
            let sample = Double(count - min(last.count, count)) / seconds
            let weight = min(seconds, 1)
            rate = rate == 0 ? sample : rate * (1 - weight) + sample * weight
            isStill = sample == 0
            peak = max(peak, rate)
        }
        last = (now, count)
    }
}
