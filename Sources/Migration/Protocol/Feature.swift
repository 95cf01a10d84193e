/// What a side can do beyond version 1 of the protocol as it was first spoken. Each side names its own in HELLO and WELCOME; what
/// the other one lacks is not used.
public enum Feature: String, Sendable, Hashable, CaseIterable {
    /// RELEASE says whether the guest ran, so that one that stood still stands still there.
    case runState = "run-state"
    /// OVERRULED tells a host that an operator of the other one has taken the guest.
    case overruling
    /// A guest that is off arrives switched off: RELEASE says so.
    case stoppedGuests = "stopped-guests"
    /// Connections with the role `host`, on which a source reserves room, takes turns at switchovers, and recalls guests.
    case evacuation
    /// What an earlier image at the destination has of a disk is not sent; see `SeedExchange`.
    case seeds
    /// EXAMINE has a host look at itself, for `crossdock doctor`.
    case examination
    /// READBACK tells how far the destination is with the digests of the disks.
    case readBack = "read-back"
    /// QEMU's stream is cut into pieces that several connections carry; see `StreamPiece`.
    case lanes = "memory-lanes"
    /// Those pieces may be compressed.
    case compressedPieces = "compressed-pieces"
    /// The destination says on the second of those connections how many pieces it has passed on.
    case acknowledgedPieces = "acknowledged-pieces"
    /// Writes to the exports of disks may be compressed.
    case compressedWrites = "compressed-writes"
    /// The destination makes taps in its bridges for networks that OFFER, or RECALL, maps.
    case networks
    /// MEMBERS brings a fleet's list.
    case members
    /// RENEW asks the host of a fleet's authority for a certificate.
    case renewal
    /// CONSOLE brings the end of what the guest has written to its console.
    case consoles
    /// GRANT lets the former host of a guest have its consoles, on connections with the role `console`.
    case consoleRelays = "console-relays"

    /// What this version can do, as it is sent.
    public static var own: [String] { allCases.map(\.rawValue) }

    /// What the other side can do. Names that this version does not know are passed over.
    public static func known(_ names: [String]?) -> Set<Feature> { Set((names ?? []).compactMap(Feature.init)) }
}
