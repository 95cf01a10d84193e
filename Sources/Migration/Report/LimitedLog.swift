internal import IO

/// A log for what others can cause as often as they like. From any thread.
public final class LimitedLog: Sendable {
    private let log: Log
    private let limit: Guarded<LogLimit>

    /// Makes one that has let nothing through.
    ///
    /// - Parameters:
    ///   - log: where the lines go.
    ///   - things: what they are about.
    public init(_ log: Log, of things: String = "refusals") {
        self.log = log
        limit = Guarded(LogLimit(of: things))
    }

    /// Logs a line, unless there were too many: see `LogLimit`.
    public func callAsFunction(_ level: Log.Level, _ text: String) {
        // What is not shown takes nobody's place.
        guard log.shows(level), let line = limit.withLock({ $0.line(text) }) else { return }
        log(level, line)
    }
}
