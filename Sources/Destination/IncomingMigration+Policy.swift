internal import Emulator
internal import IO
internal import Migration
internal import TLS

extension IncomingMigration {
    /// Asks the operator's policy about the guest, and counts the guest among those of its source.
    ///
    /// - Throws: `Refusal` with the rules that refuse it.
    func applyPolicy(to demands: GuestDemands, _ offer: Message.Offer) async throws {
        let (policy, obstacle, user) = (agent.configuration.policy, agent.filterObstacle, agent.tapUser)
        let refused = try await BlockingPool.decoding.run {
            policy.problems(of: demands, filterObstacle: obstacle, tapUser: user)
        }
        var obstacles = refused.map { Obstacle(.network, $0) }
        let figures = try await agent.readFigures(for: peer.name)
        try await agent.refreshLedger(of: peer.name)
        let allocated = offer.disks.filter { IncomingImages.deviceSize(imagePath($0, offer)) == nil }
            .reduce(UInt64(0)) { $0.addingSaturated($1.allocated) }
        agent.expireReservations()
        let reservation = agent.ledger.reservation(offer.reservation, for: offer.guest, of: peer.name)
        obstacles += admissionProblems(demands.usage, allocated: allocated, reservation, figures)
        // A rehearsal is about later, when others have arrived.
        if !offer.isRehearsal { obstacles += crowding().map { Obstacle(.policy, $0) } }
        if !obstacles.isEmpty { throw Refusal(obstacles: obstacles) }
        if offer.isRehearsal { return }
        // No turn of anybody else's lies between the judgement and this.
        let arrival = GuestRecord.Arrival(source: peer.name, usage: demands.usage)
        agent.ledger.begin(id, guest: offer.guest, arrival, allocated: allocated)
        guard let reservation else { return }
        agent.ledger.release(reservation.id)
        // It expires, should that not be possible.
        do { try await agent.saveReservations() } catch { log(.warning, "Migration \(id): \(error)") }
    }

    /// What every guest has of its devices: firmware, ROMs, a display.
    private static let usualDeviceMemory: UInt64 = 32 << 20

    /// Counts the memory of the guest's devices, of which only a QEMU that has them knows.
    ///
    /// - Throws: `Refusal` when the guest wants more with it than its source may have.
    func count(deviceMemory bytes: UInt64, _ demands: GuestDemands, _ offer: Message.Offer) throws {
        guard bytes > Self.usualDeviceMemory else { return }
        var usage = demands.usage
        usage.memory = usage.memory.addingSaturated(bytes - Self.usualDeviceMemory)
        let reservation = agent.ledger.reservation(offer.reservation, for: offer.guest, of: peer.name)
        let others = agent.ledger.usages(of: peer.name, but: id, reservation: reservation?.id)
        let problems = agent.configuration.policy.limits.problems(of: usage, besides: others)
        guard problems.isEmpty else {
            let what = "\(ByteSize.text(bytes & ~0xfffff)) of it are its devices'"
            throw Refusal(obstacles: problems.map { Obstacle(.policy, "\($0); \(what)") })
        }
        if !offer.isRehearsal { agent.ledger.amend(id, usage) }
    }

    /// Whether too many guests are on their way to this host already, a sentence.
    private func crowding() -> [String] {
        guard let most = agent.configuration.policy.mostIncoming, agent.ledger.incoming(but: id) >= most else {
            return []
        }
        return [
            "The limit of \(most) guests that may be on their way to this host at once (--most-incoming) is reached; try again when "
                + "one of them has arrived"
        ]
    }

    /// What the books of this host say against the guest.
    private func admissionProblems(
        _ usage: GuestUsage,
        allocated: UInt64,
        _ reservation: Reservation?,
        _ figures: HostFigures
    ) -> [Obstacle] {
        let (policy, ledger) = (agent.configuration.policy, agent.ledger)
        let others = ledger.usages(of: peer.name, but: id, reservation: reservation?.id)
        let problems = policy.limits.problems(of: usage, besides: others).map { Obstacle(.policy, $0) }
        // What was promised to this guest is not taken back.
        if reservation?.covers(usage, allocated: allocated) == true { return problems }
        let promises = ledger.promises(figures, but: id, reservation: reservation?.id)
        // Where nothing is kept for anybody, memory may be promised more than once: that is between the operator and the kernel.
        let memory = promises.reservations > 0 || reservation != nil ? usage.memory : nil
        return problems
            + figures.problems(memory: memory, allocated: nil, besides: promises).map { Obstacle(.memory, $0) }
            + figures.problems(memory: nil, allocated: allocated, besides: promises).map { Obstacle(.space, $0) }
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
