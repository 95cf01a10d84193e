internal import Emulator
internal import FoundationEssentials
internal import IO
internal import Migration

/// Who may bring what: the cordon, the figures of the host, and the books.
extension DestinationAgent {
    /// Milliseconds since 1970.
    static var now: Int64 { Int64(Date.now.timeIntervalSince1970 * 1000) }
    private static var longest: Int64 { PeerLimits.reservation.components.seconds * 1000 }

    /// Why this host takes nobody, a sentence; nil when it is not cordoned.
    func cordonRefusal() async -> String? {
        let directory = configuration.stateDirectory
        return await BlockingPool.shared.value {
            do { return try Cordon.read(stateDirectory: directory)?.refusal } catch {
                return "This host takes no new guests: \(error)"
            }
        }
    }

    /// What the host says of itself now, for one identity after the other question of the same.
    func readFigures(for identity: String) async throws -> HostFigures {
        let turn = accounts.figures.request(identity)
        defer { turn.end() }
        try await turn.wait()
        let (guests, images, arriving) = (guests, configuration.imageDirectory, ledger.arrivingGuests)
        return try await BlockingPool.shared.run { try HostFigures.read(guests, images: images, arriving: arriving) }
    }

    /// Gives up room whose time is over.
    func expireReservations() { ledger.expire(at: Self.now, longest: Self.longest) }

    /// Takes over what an earlier agent has kept.
    func restoreReservations() async {
        let file = reservationFile
        do {
            for reservation in try await BlockingPool.shared.run({ try file.read() }) { ledger.keep(reservation) }
        } catch { log(.error, "\(error)") }
        expireReservations()
    }

    /// Makes durable what is kept now.
    func saveReservations() async throws {
        await reservationLock.acquire()
        defer { reservationLock.release() }
        let (file, kept) = (reservationFile, ledger.kept)
        try await BlockingPool.shared.run { try file.write(kept) }
    }

    // MARK: RESERVE

    /// Decides about room for a guest.
    func reserve(_ room: HostMessage.Reserve, for identity: String, _ evacuation: String) async -> HostMessage.Content {
        do {
            try Self.judge(room)
            if let refusal = await cordonRefusal() { return .denied(refusal) }
            let figures = try await readFigures(for: identity)
            try await refreshLedger(of: identity)
            let (reservation, earlier) = try grant(room, for: identity, evacuation, figures)
            do { try await saveReservations() } catch {
                // A later agent would not know of it.
                if ledger.reservation(reservation.id, for: room.guest, of: identity) == reservation {
                    if let earlier { ledger.keep(earlier) } else { ledger.release(reservation.id) }
                }
                throw error
            }
            return .reserved(
                .init(id: reservation.id, seconds: UInt32(clamping: (reservation.expires - Self.now) / 1000))
            )
        } catch { return .denied("\(error)") }
    }

    /// Whether the figures can be such at all.
    private static func judge(_ room: HostMessage.Reserve) throws {
        try GuestStore.validate(room.guest)
        guard room.usage.memory <= 1 << 46, room.usage.disk <= 1 << 50, room.allocated <= 1 << 50,
            room.usage.processors <= 1 << 16, room.seconds > 0
        else {
            throw GuestError(
                "RESERVE for guest '\(room.guest)' is malformed: more than 64 TiB of memory, 1 PiB of disk, 65536 processors, or no time"
            )
        }
    }

    /// Keeps the room, if everything that counts leaves it. No turn of anybody else's lies between the judgement and that.
    private func grant(
        _ room: HostMessage.Reserve,
        for identity: String,
        _ evacuation: String,
        _ figures: HostFigures
    ) throws -> (Reservation, earlier: Reservation?) {
        expireReservations()
        let earlier = ledger.reservation(for: room.guest, of: identity, evacuation)
        guard earlier != nil || ledger.reservations(of: identity) < PeerLimits.reservations else {
            throw MigrationError(
                .refused,
                "The limit of \(PeerLimits.reservations) guests of one source that room is kept for is reached"
            )
        }
        let others = ledger.usages(of: identity, but: "", reservation: earlier?.id)
        let promises = ledger.promises(figures, reservation: earlier?.id)
        var reasons = configuration.policy.limits.problems(of: room.usage, besides: others)
        reasons += figures.problems(memory: room.usage.memory, allocated: room.allocated, besides: promises)
        guard reasons.isEmpty else {
            throw GuestError("There is no room for guest '\(room.guest)': \(reasons.joined(separator: "; "))")
        }
        let seconds = min(Int64(room.seconds), PeerLimits.reservation.components.seconds)
        let reservation = Reservation(
            id: earlier?.id ?? Self.makeReservationID(),
            source: identity,
            evacuation: evacuation,
            guest: room.guest,
            usage: room.usage,
            allocated: room.allocated,
            expires: Self.now + seconds * 1000
        )
        ledger.keep(reservation)
        return (reservation, earlier)
    }

    /// What nobody guesses.
    private static func makeReservationID() -> String { (0..<16).map { _ in UInt8.random(in: 0...255) }.hex }

    /// Gives room back; nothing happens when it is not there any more.
    func release(_ id: String, of identity: String, _ evacuation: String) async -> HostMessage.Content {
        if ledger.release(id, of: identity, evacuation) {
            do { try await saveReservations() } catch { log(.warning, "\(error)") }
        }
        return .unreserve(id)
    }

    // MARK: HOST

    /// What this host has to give to an identity.
    func state(for identity: String) async throws -> HostState {
        let figures = try await readFigures(for: identity)
        try await refreshLedger(of: identity)
        let cordon = await cordonRefusal()
        expireReservations()
        let promises = ledger.promises(figures)
        let policy = configuration.policy
        let (guests, directory) = (guests, configuration.stateDirectory)
        let (groups, mark) = await BlockingPool.shared.value {
            (Self.groups(of: identity, guests), try? HostMark.make(stateDirectory: directory))
        }
        return HostState(
            memory: figures.memory,
            freeMemory: figures.freeMemory,
            promisedMemory: promises.memory,
            freeDisk: figures.freeDisk,
            promisedDisk: promises.disk,
            processors: figures.processors,
            guests: UInt64(figures.memories.count),
            incoming: UInt64(ledger.incoming()),
            mostIncoming: policy.mostIncoming,
            cordon: cordon,
            allowance: policy.limits.allowance(besides: ledger.usages(of: identity, but: "")),
            groups: groups,
            mark: mark,
            clock: Self.now
        )
    }

    /// How many guests of each group that is kept apart are here and at home with an identity. Blocks.
    private static func groups(of identity: String, _ guests: GuestStore) -> [String: Int] {
        var groups: [String: Int] = [:]
        for name in guests.names() {
            guard let record = (try? guests.load(name)) ?? nil, record.released == nil,
                record.origin?.isProven(for: identity) == true, let group = record.placement?.antiAffinity
            else { continue }
            groups[group, default: 0] += 1
        }
        return groups
    }
}
