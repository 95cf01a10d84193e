internal import IO

/// What a side of a migration has decided, durably. Who may run the guest follows from these records alone.
public enum JournalRecord: Sendable, Hashable, Codable {
    /// Source: a migration of this guest began.
    ///
    /// `order` counts the migrations of this host, so that their order does not depend on any clock.
    case offered(guest: String, destination: String, order: Int)
    /// Destination: an offer of this guest was accepted.
    case accepted(guest: String, source: String, order: Int)
    /// Destination: everything is there, the source may release the guest.
    case prepared
    /// Source: the guest belongs to the destination; this side must not run it any more.
    case released
    /// Destination: the guest belongs to this side. The digests are those of its disks at the switchover, as far as they were
    /// known before it was resumed.
    case owner(digests: [String: String])
    /// Destination: the digests of the disks at the switchover.
    case digests([String: String])
    /// Source: the destination confirmed that it owns the guest. Destination: the source has confirmed that in turn.
    case confirmed
    /// Source: the destination has said that it will never run the guest, so it belongs to this side again.
    case reclaimed(reason: String)
    /// Either side: an operator has said that the other side will never run the guest, and that this one shall.
    case taken(by: String)
    /// Either side: the migration was given up before the release.
    case rolledBack(reason: String)
    /// Either side: an operator of the other host has taken the guest for that host, and this one has learnt it.
    case overruled(by: String)

    /// The guest that a journal is about, which its first record says.
    public var guest: String? {
        switch self {
        case .offered(let guest, _, _), .accepted(let guest, _, _): guest
        default: nil
        }
    }

    /// A record of bounded length, whatever the reason was.
    var bounded: JournalRecord {
        // What a peer or a program has said is shown to people, a line each.
        func cut(_ text: String) -> String { text.shown(most: 1024) }
        switch self {
        case .reclaimed(let reason): return .reclaimed(reason: cut(reason))
        case .taken(let by): return .taken(by: cut(by))
        case .rolledBack(let reason): return .rolledBack(reason: cut(reason))
        case .overruled(let by): return .overruled(by: cut(by))
        default: return self
        }
    }
}
