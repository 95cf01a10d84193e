internal import Emulator
internal import IO
internal import Migration
internal import TLS

extension IncomingMigration {
    /// Asks the operator's policy about the guest, and counts the guest among those of its source.
    ///
    /// - Throws: `Refusal` with the rules that refuse it.
    func applyPolicy(to demands: GuestDemands, _ offer: Message.Offer) async throws {
        let (policy, obstacle) = (agent.configuration.policy, agent.filterObstacle)
        var reasons = try await BlockingPool.decoding.run { policy.problems(of: demands, filterObstacle: obstacle) }
        if !policy.limits.isEmpty {
            try await agent.refreshLedger(of: peer.name)
            let others = agent.ledger.usages(of: peer.name, but: id)
            reasons += policy.limits.problems(of: demands.usage, besides: others)
        }
        if !reasons.isEmpty { throw Refusal(reasons: reasons) }
        // No turn of anybody else's lies between the judgement and this.
        if !offer.isRehearsal {
            agent.ledger.begin(id, guest: offer.guest, .init(source: peer.name, usage: demands.usage))
        }
    }
}

extension DestinationAgent {
    /// Every guest of this host that its record tells of.
    func readLedger() async throws -> GuestLedger {
        let guests = guests
        return try await BlockingPool.shared.run {
            // A damaged record is its own guest's affair.
            GuestLedger(guests.names().compactMap { (try? guests.load($0)) ?? nil })
        }
    }

    /// Looks which guests of a source are here still: they leave, and are forgotten, without a word to this agent.
    func refreshLedger(of source: String) async throws {
        let (guests, names) = (guests, ledger.residents(of: source))
        let records = try await BlockingPool.shared.run {
            names.reduce(into: [String: GuestRecord?]()) { records, name in
                // One that cannot be read counts as it did.
                do { records.updateValue(try guests.load(name), forKey: name) } catch {}
            }
        }
        ledger.refresh(records)
    }

    /// Installs the packet filter of guests' users, and says where there is none.
    ///
    /// - Returns: why the network of guests is not filtered; nil when it is.
    static func installFilter(_ configuration: Configuration, hasUsers: Bool) async -> String? {
        let users = hasUsers ? configuration.guestUsers : nil
        if configuration.policy.network == .host {
            await warnOfFilter(users, configuration.log)
            return nil
        }
        var obstacle: String?
        if let users {
            do {
                try await BlockingPool.shared.run {
                    let names = String(decoding: try DurableFile.read("/etc/resolv.conf") ?? [], as: UTF8.self)
                    try PacketFilter(users: users, nameServers: PacketFilter.nameServers(in: names)).install()
                }
            } catch { obstacle = "\(error)" }
        } else {
            obstacle = "guests have no users of their own"
        }
        guard let obstacle else { return nil }
        configuration.log(
            .warning,
            "the network of guests is not filtered: \(obstacle). Guests whose networks or disks connect to others are refused, unless "
                + "--guest-network host is given"
        )
        return obstacle
    }

    /// Says that a filter is there that its operator does not want any more.
    private static func warnOfFilter(_ users: ClosedRange<UInt32>?, _ log: Log) async {
        guard let users else { return }
        let filter = PacketFilter(users: users, nameServers: [])
        guard await BlockingPool.shared.value({ filter.isInstalled }) else { return }
        log(
            .warning,
            "an earlier agent's packet filter still keeps guests from loopback and link-local addresses; 'nft delete table inet "
                + "\(filter.table)' removes it"
        )
    }
}
