/// What two hosts need to be paired, found out before anything is written: a value of what both say of themselves.
public struct PairingPlan: Sendable, Hashable {
    /// What is to be done.
    public private(set) var steps: Set<Pairing.Step> = [.serve, .prove]
    /// What is worth knowing and stops nothing, a sentence each.
    public private(set) var notes: [String] = []

    /// Certificates that end within so many seconds are made anew.
    private static let renewal = 30 * 86400
    /// Clocks that differ by more make certificates that are not valid yet, or not any more.
    private static let mostSkew = 3_000_000.0
    /// Less than this and keys cannot be written.
    private static let leastSpace: UInt64 = 1 << 20

    /// Judges what both hosts say.
    ///
    /// - Parameters:
    ///   - here: this host.
    ///   - there: the other host.
    ///   - host: how the other host was called.
    ///   - list: the list of this host's fleet; nil when there is none.
    ///   - own: this host's entry, as it is to be.
    ///   - member: the other host's entry, as it is to be.
    ///   - hasAuthority: whether this host has the key of an authority.
    ///   - authority: the fingerprint of that authority; nil without one.
    /// - Throws: `FleetError` that says why the hosts cannot be paired, and what to do.
    public init(
        _ here: MemberLook,
        _ there: MemberLook,
        host: String,
        list: FleetList?,
        own: FleetMember,
        member: FleetMember,
        authority: String?
    ) throws {
        guard own.name != member.name else {
            throw FleetError(
                "Both hosts are called '\(own.name)'; give one another name with --name, or 'hostnamectl hostname NAME' there"
            )
        }
        for name in [own.name, member.name] where !FleetMember.isName(name) || name == "localhost" {
            throw FleetError("'\(name)' is no name for a host; give one with --name or --own-name")
        }
        guard here.version == there.version else {
            throw FleetError(
                "\(host) has Crossdock \(there.version), and this host has \(here.version); install the same release on both, "
                    + "or have it done with --install DEB"
            )
        }
        let skew = abs(Double(here.clock) - Double(there.clock))
        guard skew <= Self.mostSkew else {
            throw FleetError(
                "The clocks of the two hosts are \(Int(skew / 1000)) s apart, and certificates would not be valid; "
                    + "'timedatectl set-ntp true' on both"
            )
        }
        for (place, look) in [("this host", here), (host, there)] where look.free < Self.leastSpace {
            throw FleetError("The file system of /etc on \(place) is full: \(look.free) bytes are free; make room")
        }
        if let foreign = here.authority, foreign != authority {
            throw FleetError(
                authority == nil
                    ? "This host has a certificate of the authority \(Self.short(foreign)), whose key is on another host; pair from there"
                    : "This host has a certificate of another authority (\(Self.short(foreign))) than the one whose key it has; remove "
                        + "/etc/pki/crossdock, or name the right authority with --ca"
            )
        }
        if let foreign = there.authority, foreign != authority {
            throw FleetError(
                "\(host) has certificates of another authority (\(Self.short(foreign))): it belongs to another fleet. "
                    + "'crossdock pair --undo \(member.name)' on its authority's host ends that; or move /etc/pki/crossdock away there"
            )
        }
        if authority == nil { steps.insert(.authority) }
        if Self.needsCertificate(here, own) { steps.insert(.certifyHere) }
        if Self.needsCertificate(there, member) { steps.insert(.certifyThere) }
        let isListed = list?.members.contains(own) == true && list?.members.contains(member) == true
        if !isListed || here.list != list?.number || there.list != list?.number { steps.insert(.list) }
    }

    /// The first digits are enough to tell authorities apart.
    private static func short(_ fingerprint: String) -> String { "\(fingerprint.prefix(23))..." }

    private static func needsCertificate(_ look: MemberLook, _ member: FleetMember) -> Bool {
        guard let ends = look.ends, look.identity == member.identity else { return true }
        let names = Set(look.names.map { $0.drop { $0 != ":" }.dropFirst() }.map(String.init))
        return Int64(ends) - look.clock / 1000 < renewal || !names.isSuperset(of: member.hosts)
    }
}
