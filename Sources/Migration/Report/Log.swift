internal import Glibc
internal import IO

/// Sentences for the operator of an agent, on standard error, one a line.
public struct Log: Sendable {
    /// How much is said.
    public enum Level: Int, Sendable, Comparable, CaseIterable, CustomStringConvertible {
        /// Everything.
        case debug
        /// What happens.
        case info
        /// What needs attention.
        case warning
        /// What failed.
        case error

        /// Its name.
        public var description: String {
            switch self {
            case .debug: "debug"
            case .info: "info"
            case .warning: "warning"
            case .error: "error"
            }
        }

        /// Orders by importance.
        public static func < (a: Level, b: Level) -> Bool { a.rawValue < b.rawValue }
    }

    private let level: Level
    private let write: @Sendable (String) -> Void

    /// Whether lines of a level are written.
    public func shows(_ level: Level) -> Bool { level >= self.level }

    /// Makes a log.
    ///
    /// - Parameters:
    ///   - level: what is less important is dropped.
    ///   - write: gets each line without its end; standard error when it is not given.
    public init(level: Level = .info, write: (@Sendable (String) -> Void)? = nil) {
        self.level = level
        self.write =
            write ?? { line in
                let bytes = Array((line + "\n").utf8)
                _ = bytes.withUnsafeBytes { Glibc.write(2, $0.baseAddress, $0.count) }
            }
    }

    /// Says something; control characters, which a peer may have sent, are replaced.
    public func callAsFunction(_ level: Level, _ message: @autoclosure () -> String) {
        guard level >= self.level else { return }
        write("crossdock: \(level): \(message().shown(most: 4096))")
    }
}
