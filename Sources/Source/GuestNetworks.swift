internal import Emulator
internal import Migration

/// A guest's networks as they are offered: each that the operator maps becomes a tap that the destination makes.
struct GuestNetworks {
    /// The command line with them.
    let commandLine: GuestCommandLine
    /// Those that the destination makes; nil for none.
    let offered: [Message.Offer.Network]?

    /// Maps the networks of a guest.
    ///
    /// - Parameters:
    ///   - inspection: the guest.
    ///   - plan: what the operator has said.
    ///   - record: what this host knows of the guest.
    /// - Throws: `GuestError` naming a network that the guest does not have, or one that runs a program of this host.
    init(_ inspection: GuestInspection, _ plan: MigrationPlan, _ record: GuestRecord) throws {
        let map = plan.networks ?? NetworkMap([:])
        var unused = Set(map.bridges.keys)
        var names: [HostNetwork: String] = [:]
        var offered: [Message.Offer.Network] = []
        // Who asks for its own guest has the networks that the guest had there.
        let isHome = plan.identity != nil && plan.identity == record.arrival?.source
        for network in inspection.networks {
            unused.subtract(network.names)
            let former = record.taps?.first { isHome && $0.name == network.tap }?.former
            if let bridge = network.names.lazy.compactMap({ map.bridges[$0] }).first {
                let tap = Self.name(network, besides: inspection.networks, names)
                names[network] = tap
                offered.append(.init(tap: tap, bridge: bridge, former: Self.plain(network.bridge)))
            } else if let former {
                names[network] = former.tap
                guard let bridge = former.bridge else { continue }
                offered.append(.init(tap: former.tap, bridge: bridge, former: Self.plain(network.bridge)))
            } else if network.runsProgram {
                let name = network.names.first
                throw GuestError(
                    "A guest with \(network.option) runs a script of this host, which the other one does not have; "
                        + (name.map { "--network \($0)=BRIDGE has a tap made in a bridge there instead" }
                            ?? "give the tap a name (ifname=), then --network NAME=BRIDGE has one made in a bridge there instead")
                )
            }
        }
        if let missing = unused.min(), !map.isForMany {
            let shown = inspection.networks.map(\.shown).joined(separator: ", ")
            throw GuestError(
                "Guest '\(plan.guest)' has no network '\(missing)' for --network; "
                    + (shown.isEmpty ? "none of its networks is an interface of this host" : "it has \(shown)")
            )
        }
        commandLine = try inspection.commandLine.joining(names)
        self.offered = offered.isEmpty ? nil : offered
    }

    /// A name that another host takes for one.
    private static func plain(_ bridge: String?) -> String? { bridge.flatMap { PeerText.isInterface($0) ? $0 : nil } }

    /// What the interface is called: as here, if it has a name that no other network of the guest has.
    private static func name(
        _ network: HostNetwork,
        besides networks: [HostNetwork],
        _ taken: [HostNetwork: String]
    ) -> String {
        let others = networks.filter { $0 != network }.compactMap(\.tap) + taken.values
        if let tap = network.tap, PeerText.isInterface(tap), !others.contains(tap) { return tap }
        return (0...networks.count).lazy.map { "tap\($0)" }.first { !others.contains($0) } ?? "tap"
    }
}
