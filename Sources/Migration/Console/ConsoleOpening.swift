internal import Emulator
internal import IO

/// OPEN: which console of which guest somebody wants, on a connection with the role `console`.
public struct ConsoleOpening: Sendable, Hashable, Codable {
    /// What a guest shows.
    public enum Kind: String, Sendable, Hashable, Codable, CaseIterable {
        /// The serial console that the agent holds: after OPENED the connection carries the frames of `docs/consoles.md`.
        case serial
        /// The guest's VNC display: after OPENED the connection carries its bytes.
        case vnc
    }

    /// The guest.
    public var guest: String
    /// What of it.
    public var kind: Kind
    /// What its former host was given; nil for who hopes for the operator's word.
    public var grant: ConsoleGrant?
    /// Whether nothing will be written.
    public var view: Bool
    /// For `serial`: from which byte on, as far as it is of the ring `ring`; nil for the latest.
    public var from: UInt64?
    /// See `from`.
    public var ring: String?
    /// The agents that pass this on, by the marks that they have made for themselves: one that finds its own there would pass on its own words.
    public var path: [String]
    /// How many of them there are in a row, this one among them.
    public var hops: Int

    /// The most agents in a row.
    public static let mostHops = 4
    /// The most agents altogether: one may pass a console on to several.
    public static let mostMarks = 16

    /// Makes one.
    public init(
        guest: String,
        kind: Kind,
        grant: ConsoleGrant? = nil,
        view: Bool = false,
        from: UInt64? = nil,
        ring: String? = nil,
        path: [String] = [],
        hops: Int = 1
    ) {
        (self.guest, self.kind, self.grant, self.view) = (guest, kind, grant, view)
        (self.from, self.ring, self.path, self.hops) = (from, ring, path, hops)
    }

    /// Whether it is one that an agent can have sent.
    public var isPlausible: Bool {
        (try? GuestStore.validate(guest)) != nil && from ?? 0 <= ConsoleTail.mostOffset
            && ring.map(ConsoleTail.isRing) ?? true && path.count <= Self.mostMarks
            && (1...Self.mostHops).contains(hops) && path.allSatisfy(ConsoleTail.isRing)
    }
}
