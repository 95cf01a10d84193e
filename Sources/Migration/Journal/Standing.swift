/// Where a migration stands on the host that the guest leaves, as its journal says.
public enum SourceStanding: Sendable, Hashable {
    /// Offered, and nothing decided: the guest belongs to this host.
    case open
    /// The guest belongs to the destination, which has not confirmed it: it must not run here.
    case released
    /// The destination has said that it will never run the guest, which belongs to this host again; not cleaned up yet.
    case reclaimed(reason: String)
    /// An operator has said that the destination will never run the guest, which belongs to this host; not cleaned up yet.
    case taken(by: String)
    /// The guest runs on the destination.
    case confirmed
    /// An operator of the destination has taken the guest for that host without this host's word.
    case overruled(by: String)
    /// Given up: the guest belongs to this host, and nothing is left to do.
    case rolledBack(reason: String)

    /// Whether this host may run the guest, as far as this migration is concerned.
    public var mayRunHere: Bool {
        switch self {
        case .open, .reclaimed, .taken, .rolledBack: true
        case .released, .confirmed, .overruled: false
        }
    }

    /// Whether the last word about the guest is spoken.
    public var isOver: Bool {
        switch self {
        case .confirmed, .overruled, .rolledBack: true
        case .open, .released, .reclaimed, .taken: false
        }
    }
}

/// Where a migration stands on the host that the guest comes to, as its journal says.
public enum DestinationStanding: Sendable, Hashable {
    /// An offer was accepted: the guest belongs to the source, and this host can give it up.
    case accepted
    /// Everything is here and the source may have released it: only the source's word, or an operator, ends this.
    case prepared
    /// The guest belongs to this host. The digests of its disks at the switchover, as far as they are known.
    case owner(digests: [String: String])
    /// An operator has said that the source will never run the guest, which belongs to this host.
    case taken(by: String, digests: [String: String])
    /// An operator of the source has taken the guest for that host without this host's word.
    case overruled(by: String)
    /// Given up: this host will never run the guest by this migration.
    case rolledBack(reason: String)

    /// The digests with which this host took the guest over; nil when it has not.
    public var ownerDigests: [String: String]? {
        switch self {
        case .owner(let digests), .taken(_, let digests): digests
        case .accepted, .prepared, .overruled, .rolledBack: nil
        }
    }

    /// Whether the last word about the guest is spoken.
    public var isOver: Bool {
        switch self {
        case .owner, .taken, .overruled, .rolledBack: true
        case .accepted, .prepared: false
        }
    }
}

extension SourceStanding {
    /// The standing after one more record. Records of the other side, and what follows the end, change nothing.
    func after(_ record: JournalRecord) -> SourceStanding {
        switch (self, record) {
        case (_, .overruled(let by)): .overruled(by: by)
        case (.confirmed, _), (.rolledBack, _), (.overruled, _): self
        case (_, .released): .released
        case (_, .reclaimed(let reason)): .reclaimed(reason: reason)
        case (_, .taken(let by)): .taken(by: by)
        case (_, .confirmed): .confirmed
        case (_, .rolledBack(let reason)): .rolledBack(reason: reason)
        default: self
        }
    }
}

extension DestinationStanding {
    /// The standing after one more record. Records of the other side, and what contradicts `owner` or `rolledBack`, change
    /// nothing.
    func after(_ record: JournalRecord) -> DestinationStanding {
        switch (self, record) {
        case (_, .overruled(let by)): .overruled(by: by)
        case (.taken(let by, _), .owner(let digests)), (.taken(let by, _), .digests(let digests)):
            .taken(by: by, digests: digests)
        case (.owner, .digests(let digests)): .owner(digests: digests)
        case (.owner(let digests), .taken(let by)): .taken(by: by, digests: digests)
        case (.owner, _), (.taken, _), (.rolledBack, _), (.overruled, _): self
        case (_, .prepared): .prepared
        case (_, .owner(let digests)): .owner(digests: digests)
        case (_, .taken(let by)): .taken(by: by, digests: [:])
        case (_, .rolledBack(let reason)): .rolledBack(reason: reason)
        default: self
        }
    }
}
