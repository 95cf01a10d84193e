/// What the operator of a guest has said about where it goes and when it runs. It travels with the guest.
public struct GuestPlacement: Sendable, Hashable, Codable {
    /// What an evacuation of its host does with a guest.
    public enum Evacuation: String, Sendable, Hashable, Codable, CaseIterable {
        /// It moves while it runs.
        case live
        /// It may be stopped, and moves then.
        case stop
        /// It stays where it is.
        case leave
    }

    /// Labels by their keys: 'env' to 'prod'.
    public var labels: [String: String] = [:]
    /// What an evacuation does with it; nil when nothing was said.
    public var evacuation: Evacuation?
    /// Guests of the same group are kept on different hosts; nil for a guest of no group.
    public var antiAffinity: String?
    /// Guests with a higher number go first, -1000 to 1000; nil when nothing was said, which counts as 0.
    public var priority: Int?

    /// Whether it is started whenever the host that it belongs to is; nil when nothing was said, which is no.
    public var autostart: Bool?

    /// The serial socket that the agent of its host holds as its console, by a name of its command line; nil when the agent leaves all alone.
    public var console: String?

    /// The port at which the agent of its host gives its screen to viewers of VNC by TLS, where the agent does that; nil for none.
    public var vncPort: UInt16?

    /// Which ports may be taken for that: those of VNC, and as many as a host has guests.
    public static let vncPorts: ClosedRange<UInt16> = 5900...6899
    /// The most labels of a guest.
    public static let mostLabels = 32
    /// The most bytes of a label's value.
    public static let longestValue = 255
    /// The most bytes of a label's key and of a group.
    public static let longestName = 63
    /// What a priority may be.
    public static let priorities = -1000...1000

    /// Nothing was said.
    public init() {}

    /// Whether nothing was said.
    public var isEmpty: Bool { self == GuestPlacement() }

    /// Sees that all of it is within its bounds.
    ///
    /// - Throws: `GuestError` that names what is not.
    public func judge() throws {
        guard labels.count <= Self.mostLabels else {
            throw GuestError("The limit of \(Self.mostLabels) labels of a guest is exceeded: it has \(labels.count)")
        }
        for (key, value) in labels {
            try Self.judge(name: key, "key of a label")
            guard value.utf8.count <= Self.longestValue, PeerText.isPlain(value) else {
                throw GuestError(
                    "The label '\(key)' has a value that is longer than \(Self.longestValue) bytes, or has control characters"
                )
            }
        }
        if let antiAffinity { try Self.judge(name: antiAffinity, "group") }
        if let console { try Self.judge(name: console, "serial socket") }
        if let vncPort, !Self.vncPorts.contains(vncPort) {
            throw GuestError(
                "The port \(vncPort) is none for a screen: take one from \(Self.vncPorts.lowerBound) to \(Self.vncPorts.upperBound)"
            )
        }
        if let priority, !Self.priorities.contains(priority) {
            throw GuestError(
                "The priority \(priority) is none: it is a number from \(Self.priorities.lowerBound) to \(Self.priorities.upperBound)"
            )
        }
    }

    private static func judge(name: String, _ what: String) throws {
        let isPlain = name.utf8.allSatisfy {
            ($0 >= 48 && $0 <= 57) || ($0 >= 65 && $0 <= 90) || ($0 >= 97 && $0 <= 122)
                || [45, 46, 47, 95].contains($0)
        }
        guard isPlain, !name.isEmpty, name.utf8.count <= longestName else {
            throw GuestError(
                "'\(name.prefix(100))' is no \(what): use up to \(longestName) letters, digits, '.', '_', '/' and '-'"
            )
        }
    }
}
