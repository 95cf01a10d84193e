internal import IO

/// What a check has found.
public struct Finding: Sendable, Hashable, Codable {
    /// How it went.
    public enum Result: String, Sendable, Hashable, Codable, Comparable {
        /// As it should be.
        case ok
        /// A migration works; it may be slow, or something else may be missed.
        case warn
        /// A migration does not work.
        case fail

        private var weight: Int {
            switch self {
            case .ok: 0
            case .warn: 1
            case .fail: 2
            }
        }

        /// Orders by weight.
        public static func < (one: Result, other: Result) -> Bool { one.weight < other.weight }
    }

    /// The check.
    public var check: Check
    /// How it went.
    public var result: Result
    /// The guest that it is about; nil for the hosts.
    public var guest: String?
    /// What it found on this host, or of this guest.
    public var here: String?
    /// What it found on the other host.
    public var there: String?
    /// What is wrong, a sentence without a full stop; nil when nothing is.
    public var message: String?
    /// The command that mends it, or what to do; nil when there is nothing to do.
    public var remedy: String?

    /// Describes a finding.
    public init(
        _ check: Check,
        _ result: Result,
        here: String? = nil,
        there: String? = nil,
        message: String? = nil,
        remedy: String? = nil,
        guest: String? = nil
    ) {
        self.check = check
        self.result = result
        self.here = here
        self.there = there
        self.message = message
        self.remedy = remedy
        self.guest = guest
    }

    /// What the other host says of itself, as it is shown here: its own side is the other one.
    ///
    /// - Parameter host: its name.
    public func seen(on host: String) -> Finding {
        func shown(_ text: String?) -> String? { text.map { $0.shown(most: 1000) } }
        return Finding(
            check,
            result,
            there: shown(here),
            message: shown(message).map { "On \(host): \($0)" },
            remedy: shown(remedy).map { "on \(host): \($0)" },
            guest: shown(guest)
        )
    }
}
