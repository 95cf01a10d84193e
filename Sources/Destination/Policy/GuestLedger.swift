internal import Emulator

/// What the guests of each source take of a host: those that are here, those that are on their way, and those that room is kept for.
struct GuestLedger: Sendable {
    /// A guest on its way.
    private struct Coming {
        var guest: String
        var arrival: GuestRecord.Arrival
        /// Bytes that its copy needs at least.
        var allocated: UInt64
    }

    /// Guests that are here, by their names.
    private var residents: [String: GuestRecord.Arrival] = [:]
    /// Guests on their way, by their migrations.
    private var arriving: [String: Coming] = [:]
    /// Room that is kept, by its id.
    private var reservations: [String: Reservation] = [:]

    /// Begins with what is known of the guests that are here.
    init(_ records: [GuestRecord] = []) { for record in records { residents[record.name] = Self.arrival(record) } }

    /// Where a guest came from that still is here.
    private static func arrival(_ record: GuestRecord) -> GuestRecord.Arrival? {
        record.released == nil ? record.arrival : nil
    }

    /// The guests of a source that are here, as far as is known.
    func residents(of source: String) -> [String] { residents.filter { $0.value.source == source }.map(\.key) }

    /// Takes over what the records of guests say now; nil for one that is gone.
    mutating func refresh(_ records: [String: GuestRecord?]) {
        for (name, record) in records { residents[name] = record.flatMap(Self.arrival) }
    }

    /// What the guests of a source take, those among them that room is kept for.
    ///
    /// - Parameters:
    ///   - source: an identity.
    ///   - migration: one whose guest is not counted.
    ///   - reservation: one that is not counted.
    func usages(of source: String, but migration: String, reservation: String? = nil) -> [GuestUsage] {
        let coming = arriving.filter { $0.key != migration && $0.value.arrival.source == source }.values
        var names = Set(coming.map(\.guest))
        let here = residents.filter { $0.value.source == source && !names.contains($0.key) }
        names.formUnion(here.keys)
        let kept = reservations.values.filter {
            $0.source == source && $0.id != reservation && !names.contains($0.guest)
        }
        return coming.map(\.arrival.usage) + here.values.map(\.usage) + kept.map(\.usage)
    }

    /// How many guests are on their way.
    ///
    /// - Parameter migration: one whose guest is not counted.
    func incoming(but migration: String = "") -> Int { arriving.count { $0.key != migration } }

    /// The names of the guests that are on their way.
    var arrivingGuests: [String] { arriving.values.map(\.guest) }

    /// A guest is on its way.
    mutating func begin(_ migration: String, guest: String, _ arrival: GuestRecord.Arrival, allocated: UInt64 = 0) {
        arriving[migration] = Coming(guest: guest, arrival: arrival, allocated: allocated)
    }

    /// The guest of a migration takes something else than was known.
    mutating func amend(_ migration: String, _ usage: GuestUsage) { arriving[migration]?.arrival.usage = usage }

    /// What the guest of a migration takes.
    func arrival(_ migration: String) -> GuestRecord.Arrival? { arriving[migration]?.arrival }

    /// The guest of a migration is here.
    mutating func settle(_ migration: String) {
        guard let coming = arriving.removeValue(forKey: migration) else { return }
        residents[coming.guest] = coming.arrival
    }

    /// The guest of a migration does not come.
    mutating func drop(_ migration: String) { arriving[migration] = nil }

    // MARK: reservations

    /// Everything that is kept.
    var kept: [Reservation] { reservations.values.sorted { $0.id < $1.id } }

    /// The room that is kept for a guest of an evacuation; nil when there is none.
    func reservation(for guest: String, of source: String, _ evacuation: String) -> Reservation? {
        reservations.values.first { $0.guest == guest && $0.source == source && $0.evacuation == evacuation }
    }

    /// The room that an offer of a source names for a guest; nil when it is not kept, or for somebody else.
    func reservation(_ id: String?, for guest: String, of source: String) -> Reservation? {
        guard let id, let found = reservations[id], found.source == source, found.guest == guest else { return nil }
        return found
    }

    /// How many guests of a source room is kept for.
    func reservations(of source: String) -> Int { reservations.values.count { $0.source == source } }

    /// Keeps room, in the place of an earlier reservation of the same id.
    mutating func keep(_ reservation: Reservation) { reservations[reservation.id] = reservation }

    /// Keeps room no longer.
    mutating func release(_ id: String) { reservations[id] = nil }

    /// Room of a source and an evacuation is not needed any more. Returns whether it was kept.
    mutating func release(_ id: String, of source: String, _ evacuation: String) -> Bool {
        guard let found = reservations[id], found.source == source, found.evacuation == evacuation else { return false }
        reservations[id] = nil
        return true
    }

    /// Gives up what has expired.
    ///
    /// - Parameters:
    ///   - now: milliseconds since 1970.
    ///   - longest: the longest time to live, in milliseconds. A clock that was set back keeps nothing longer than that.
    mutating func expire(at now: Int64, longest: Int64) {
        for (id, reservation) in reservations {
            if reservation.expires <= now {
                reservations[id] = nil
            } else {
                reservations[id]?.expires = min(reservation.expires, now.addingReportingOverflow(longest).partialValue)
            }
        }
    }

    // MARK: what is promised

    /// What a host has promised and not given yet.
    struct Promises: Sendable, Hashable {
        /// Bytes of memory.
        var memory: UInt64 = 0
        /// Bytes of the file system of images.
        var disk: UInt64 = 0
        /// How many guests have something that is kept for them.
        var reservations = 0
    }

    /// What is promised to others.
    ///
    /// - Parameters:
    ///   - figures: what the host says of the guests that have a QEMU.
    ///   - migration: one whose guest is not counted.
    ///   - reservation: one that is not counted.
    func promises(_ figures: HostFigures, but migration: String = "", reservation: String? = nil) -> Promises {
        /// Another source's guest of the same name takes nobody's room.
        struct Owned: Hashable {
            var source: String
            var guest: String
        }
        var promises = Promises()
        var given: Set<Owned> = []
        for (id, coming) in arriving where id != migration {
            given.insert(Owned(source: coming.arrival.source, guest: coming.guest))
            let written = figures.written[coming.guest] ?? 0
            promises.disk = promises.disk.addingSaturated(coming.allocated - min(written, coming.allocated))
            if figures.memories[coming.guest] == nil {
                promises.memory = promises.memory.addingSaturated(coming.arrival.usage.memory)
            }
        }
        for memory in figures.memories.values {
            promises.memory = promises.memory.addingSaturated(memory.most - min(memory.taken, memory.most))
        }
        // A guest whose QEMU is here already has what was kept for it.
        // One that nobody knows of was let in by an agent which was killed, and is whose the room is.
        var nobodys = Set(figures.memories.keys).subtracting(arriving.values.map(\.guest))
        for (name, arrival) in residents where nobodys.remove(name) != nil {
            given.insert(Owned(source: arrival.source, guest: name))
        }
        for kept in reservations.values
        where kept.id != reservation && !nobodys.contains(kept.guest)
            && !given.contains(Owned(source: kept.source, guest: kept.guest))
        {
            promises.memory = promises.memory.addingSaturated(kept.usage.memory)
            promises.disk = promises.disk.addingSaturated(kept.allocated)
            promises.reservations += 1
        }
        return promises
    }
}
