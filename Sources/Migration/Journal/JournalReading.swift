/// What a journal says, folded once from its records.
public struct JournalReading: Sendable, Hashable {
    /// Which side this host is on, and where the migration stands there.
    public enum Standing: Sendable, Hashable {
        /// The guest leaves, or left, this host.
        case source(SourceStanding)
        /// It comes, or came, to this host.
        case destination(DestinationStanding)
    }

    /// The guest.
    public let guest: String
    /// The other host: as the operator named the destination, or as the source's identity names it.
    public let peer: String
    /// Which of this host's migrations it is, counted from 0.
    public let order: Int
    /// Whether `released` was ever written: images may bear another name since.
    public let wasReleased: Bool
    /// Whether `prepared` was ever written: the source may have released the guest since.
    public let wasPrepared: Bool
    /// Whether this host, as the one that the guest came to, ever wrote that it owns the guest: it may run here whatever followed.
    public let wasOwned: Bool
    /// Whether the source has confirmed that.
    public let isSettled: Bool
    /// Where it stands.
    public let standing: Standing

    /// Folds the records of a journal; nil when they do not begin a migration.
    public init?(_ records: some Sequence<JournalRecord>) {
        var iterator = records.makeIterator()
        var (wasReleased, wasPrepared, wasOwned, isSettled) = (false, false, false, false)
        switch iterator.next() {
        case .offered(let guest, let peer, let order):
            (self.guest, self.peer, self.order) = (guest, peer, order)
            var standing = SourceStanding.open
            while let record = iterator.next() {
                wasReleased = wasReleased || record == .released
                standing = standing.after(record)
            }
            self.standing = .source(standing)
        case .accepted(let guest, let peer, let order):
            (self.guest, self.peer, self.order) = (guest, peer, order)
            var standing = DestinationStanding.accepted
            while let record = iterator.next() {
                switch record {
                case .prepared: wasPrepared = true
                case .owner, .taken: wasOwned = true
                case .confirmed: isSettled = true
                default: break
                }
                standing = standing.after(record)
            }
            self.standing = .destination(standing)
        default: return nil
        }
        (self.wasReleased, self.wasPrepared) = (wasReleased, wasPrepared)
        (self.wasOwned, self.isSettled) = (wasOwned, isSettled)
    }

    /// Whether an operator of this host has taken the guest, and the other host has not learnt it.
    public var isTaken: Bool {
        switch standing {
        case .source(.taken), .destination(.taken): true
        case .source, .destination: false
        }
    }

    /// Whether this migration decides about its guest even though others of it began before: the guest is here, or is about to
    /// be. What was only offered to this host decides nothing, whoever offered it.
    var supersedes: Bool {
        switch standing {
        case .source: true
        case .destination(.prepared), .destination(.owner), .destination(.taken), .destination(.overruled): true
        case .destination(.accepted), .destination(.rolledBack): false
        }
    }
}
