/// Where a destination agent stands in a migration, as WELCOME says it.
public enum DestinationState: String, Sendable, Hashable, Codable {
    /// It has not heard of it, or of nothing but its id.
    case new
    /// It has accepted the offer, and can give it up.
    case offered
    /// It has everything, and waits for the source's word.
    case prepared
    /// The guest belongs to it.
    case owner
    /// The guest belongs to it, and the source has no part in it any more.
    case done
    /// It will never run the guest by this migration.
    case aborted
}
