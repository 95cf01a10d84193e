/// The speed of something that is counted now and then.
struct RateMeter {
    private var last: (instant: ContinuousClock.Instant, count: UInt64)?
    /// Per second, smoothed over about a second.
    private(set) var rate = 0.0
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
            peak = max(peak, rate)
        }
        last = (now, count)
    }
}
