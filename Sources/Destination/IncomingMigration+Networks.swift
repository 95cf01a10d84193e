internal import Emulator
internal import Glibc
internal import IO
internal import Migration

/// The networks for which the source's operator has named a bridge of this host.
extension IncomingMigration {
    /// How long a bridge may wait with a new port: twice its usual `forward_delay`, and a little; less than a source waits for MIRRORED.
    private static let bridgePatience = Duration.seconds(40)

    /// Chooses the taps that are made for the guest: under the names that they have, where those are free.
    ///
    /// - Returns: the name of each tap whose name is another one here.
    func chooseTaps(_ offer: Message.Offer, _ commandLine: GuestCommandLine) throws -> [String: String] {
        let interfaces = NetworkInterfaces()
        var names: [String: String] = [:]
        taps = []
        for network in offer.networks ?? [] {
            let promised = agent.promisedTaps.union(taps.map(\.name))
            if !promised.contains(network.tap),
                interfaces.isFree(tap: network.tap, in: network.bridge, for: agent.tapUser)
            {
                continue
            }
            var tap = GuestTap(
                name: network.tap,
                bridge: network.bridge,
                hasQueues: try commandLine.hostNetworks().contains { $0.tap == network.tap && $0.hasQueues },
                former: .init(tap: network.tap, bridge: network.former)
            )
            var number = 0
            while promised.contains(tap.name) || interfaces.isThere(tap.name) {
                tap.name = "xdtap\(number)"
                number += 1
            }
            if tap.name != network.tap { names[network.tap] = tap.name }
            taps.append(tap)
        }
        return names
    }

    /// What becomes of the networks, for who looks at a rehearsal.
    func sketchNetworks(_ offer: Message.Offer) -> [String] {
        let interfaces = NetworkInterfaces()
        return (offer.networks ?? []).map { network in
            interfaces.isFree(tap: network.tap, in: network.bridge, for: agent.tapUser)
                ? "network \(network.tap): the tap interface of that name in the bridge \(network.bridge)"
                : "network \(network.tap): a tap interface is made in the bridge \(network.bridge), and removed with the guest"
        }
    }

    /// Waits, while the guest still runs at the source, until the bridges pass on what its taps send: a bridge keeps a new port from that
    /// for a while, and would swallow what tells others where the guest is now.
    func awaitBridges() async {
        guard let commandLine = guest?.record?.commandLine, let taps = try? commandLine.taps().compactMap({ $0 }) else {
            return
        }
        let end = ContinuousClock.now + Self.bridgePatience
        while !abandonment.hasHappened {
            let waiting = await BlockingPool.shared.value { taps.filter(NetworkInterfaces().isWaiting) }
            if waiting.isEmpty { return }
            guard ContinuousClock.now < end else {
                return log(
                    .warning,
                    "Migration \(id): the bridge passes nothing on from \(waiting.joined(separator: ", ")); the guest may be cut off"
                )
            }
            await agent.loop.sleep(for: .milliseconds(100))
        }
    }
}

extension DestinationAgent {
    /// The names of taps that are made, or about to be, for guests that are on their way.
    var promisedTaps: Set<String> { Set(arrivals.flatMap(\.taps).map(\.name)) }
}
