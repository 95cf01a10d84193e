internal import Emulator
internal import IO

/// Where each guest of an evacuation goes: first fit, the largest first, on memory and disk.
///
/// It only proposes: the target alone knows what it can still take, and says so when room is reserved.
struct Placement: Sendable {
    /// A guest that is to be placed.
    struct Guest: Sendable {
        var name: String
        /// Bytes.
        var memory: UInt64
        /// Bytes.
        var disk: UInt64
        /// Those that share a group are kept apart.
        var group: String?
        /// The hosts on which its rehearsal went well, by their places in `hosts`; in the order of preference.
        var fits: [Int]
    }

    /// A host that takes guests; nil for a figure that is not known, which limits nothing.
    struct Host: Sendable {
        var name: String
        /// Free bytes of memory.
        var memory: UInt64?
        /// Free bytes for disks.
        var disk: UInt64?
        /// How many guests it still takes.
        var guests: UInt64?
        /// How many it has already of each group.
        var groups: [String: Int] = [:]
    }

    /// How strictly a group is kept apart.
    enum Affinity: Sendable {
        /// Never two on one host.
        case kept
        /// As evenly as possible, and on one host where there is no other way.
        case ignored
    }

    /// A guest's hosts, the proposed one first and those that it might go to instead after it; or why there is none.
    enum Proposal: Sendable, Hashable {
        case hosts([Int])
        case none(String)
    }

    /// Places all guests.
    static func propose(_ guests: [Guest], on hosts: [Host], _ affinity: Affinity) -> [String: Proposal] {
        var hosts = hosts
        var groups = Dictionary(uniqueKeysWithValues: hosts.indices.map { ($0, hosts[$0].groups) })
        var proposals: [String: Proposal] = [:]
        let largestFirst = guests.sorted {
            ($0.memory.addingSaturated($0.disk), $1.name) > ($1.memory.addingSaturated($1.disk), $0.name)
        }
        for guest in largestFirst {
            func members(_ host: Int) -> Int { guest.group.map { groups[host]?[$0] ?? 0 } ?? 0 }
            var reasons: [String] = []
            let open = guest.fits.filter { host in
                if let reason = shortage(guest, hosts[host]) {
                    reasons.append("\(hosts[host].name): \(reason)")
                    return false
                }
                if let group = guest.group, affinity == .kept, members(host) > 0 {
                    reasons.append(
                        "\(hosts[host].name): another guest of the group '\(group)' \(hosts[host].groups[group] == nil ? "goes" : "is") there; --ignore-affinity permits that"
                    )
                    return false
                }
                return true
            }
            // Spread first: among equals the one that was named first.
            let chosen = open.enumerated().min { (members($0.element), $0.offset) < (members($1.element), $1.offset) }?
                .element
            guard let chosen else {
                let nothing = guest.fits.isEmpty ? "no host can run it" : reasons.joined(separator: "; ")
                proposals[guest.name] = Proposal.none(nothing)
                continue
            }
            // The others of the plan may be elsewhere by then; those that are there already stay.
            let others = guest.fits.filter { host in
                host != chosen && (affinity == .ignored || guest.group.map { hosts[host].groups[$0] == nil } ?? true)
            }
            proposals[guest.name] = .hosts([chosen] + others)
            hosts[chosen].memory = hosts[chosen].memory.map { $0 - min($0, guest.memory) }
            hosts[chosen].disk = hosts[chosen].disk.map { $0 - min($0, guest.disk) }
            hosts[chosen].guests = hosts[chosen].guests.map { $0 - min($0, 1) }
            if let group = guest.group { groups[chosen, default: [:]][group, default: 0] += 1 }
        }
        return proposals
    }

    /// What a host lacks for one more guest; nil when it has enough.
    private static func shortage(_ guest: Guest, _ host: Host) -> String? {
        if host.guests == 0 { return "it takes no further guest" }
        for (what, wanted, free) in [("memory", guest.memory, host.memory), ("disk", guest.disk, host.disk)] {
            guard let free, free < wanted else { continue }
            return
                "it would have \(ByteSize.text(free)) of \(what) left for the \(ByteSize.text(wanted)) that the guest takes"
        }
        return nil
    }
}
