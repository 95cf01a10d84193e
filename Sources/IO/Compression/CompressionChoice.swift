/// Decides piece by piece whether to compress: where that gets more across, as far as the last pieces tell.
///
/// A piece is worth it when compressing it and sending what is left takes less time than sending it whole. Data that does not shrink is
/// tried again now and then only.
public struct CompressionChoice: Sendable {
    /// The level that keeps up with a line of some gigabits per second on one core.
    public static let usualLevel = 1
    /// Bytes per second from which on a line is faster than the usual level on one core.
    public static let fastLine = 300e6
    /// What has to be left at most of a piece that is sent compressed.
    static let worthwhile = 0.9
    /// How many pieces go as they are after one that did not shrink; twice as many each time, up to the second.
    static let (leastRest, mostRest) = (4, 256)
    /// How much a new figure counts beside what was known.
    private static let weight = 0.25
    /// Bytes per second that a compressor takes which was not measured yet.
    private static let assumedSpeed = fastLine

    private let wanted: Compression
    /// Bytes of input per second of the compressor.
    private var speed = CompressionChoice.assumedSpeed
    /// What was left of the last pieces, in parts of one; nil when none was tried.
    private var left: Double?
    /// Bytes per second that the line takes; nil when it was not measured.
    private var line: Double?
    private var rest = 0
    private var nextRest = CompressionChoice.leastRest

    /// Bytes per second up to which a line is so slow that a short measurement shows it, whatever else the processors do.
    public static let slowLine = 60e6

    /// Decides by what was asked for.
    ///
    /// - Parameter line: what the line was measured to take, in bytes per second; it counts only where it is little.
    public init(_ wanted: Compression, line: Double? = nil) {
        self.wanted = wanted
        self.line = line.flatMap { $0 > 0 && $0 <= Self.slowLine ? $0 : nil }
    }

    /// The level of zstd; nil when nothing is ever compressed.
    public var level: Int? {
        switch wanted {
        case .off: nil
        case .auto: Self.usualLevel
        case .level(let level): level
        }
    }

    /// Whether the next piece is to be compressed.
    public mutating func next() -> Bool {
        if wanted == .off { return false }
        if rest > 0 {
            rest -= 1
            return false
        }
        guard wanted == .auto else { return true }
        guard let line else { return false }
        return 1 / speed + min(left ?? 0.5, Self.worthwhile) / line < 1 / line
    }

    /// A piece was compressed.
    ///
    /// - Parameters:
    ///   - count: its bytes.
    ///   - result: the bytes that are left; as many as before when it did not shrink.
    ///   - time: what that took.
    /// - Returns: whether the result is to be sent instead.
    public mutating func compressed(_ count: Int, to result: Int, in time: Duration) -> Bool {
        let seconds = max(time / .seconds(1), 1e-9)
        speed += (Double(count) / seconds - speed) * Self.weight
        let part = Double(result) / Double(max(count, 1))
        left = left.map { $0 + (part - $0) * Self.weight } ?? part
        guard part <= Self.worthwhile else {
            rest = nextRest
            nextRest = min(nextRest * 2, Self.mostRest)
            return false
        }
        nextRest = Self.leastRest
        return true
    }

    /// The line has taken so many bytes in that time, and more were waiting.
    public mutating func sent(_ bytes: Int, in time: Duration) {
        let rate = Double(bytes) / max(time / .seconds(1), 1e-9)
        line = line.map { $0 + (rate - $0) * Self.weight } ?? rate
    }

    /// The line was seen to take so many bytes per second, while more were waiting; infinity for one on which nothing is to be compressed.
    public mutating func measured(line rate: Double) { line = rate }
}
