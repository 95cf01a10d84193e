/// Keeps what peers can cause from filling the operator's log: a few lines in a while, and how many were left out.
public struct LogLimit: Sendable {
    /// How many lines in a period.
    public static let lines = 20
    /// The period.
    public static let period = Duration.seconds(60)

    private var began = ContinuousClock.now
    private var count = 0

    private let things: String

    /// Makes a limit that has let nothing through.
    ///
    /// - Parameter things: what the lines are about.
    public init(of things: String = "refusals") { self.things = things }

    /// The line to log; nil when there were too many. The first one of a period tells how many the last one left out.
    public mutating func line(_ text: String, now: ContinuousClock.Instant = .now) -> String? {
        var text = text
        if now - began >= Self.period {
            if count > Self.lines { text += " (and \(count - Self.lines) other \(things) that were not logged)" }
            began = now
            count = 0
        }
        count += 1
        return count <= Self.lines ? text : nil
    }
}
