internal import Emulator

/// What the guests of each source take of a host: those that are here, and those that are on their way.
struct GuestLedger: Sendable {
    /// Guests that are here, by their names.
    private var residents: [String: GuestRecord.Arrival] = [:]
    /// Guests on their way, by their migrations.
    private var arriving: [String: (guest: String, GuestRecord.Arrival)] = [:]

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

    /// What the guests of a source take.
    ///
    /// - Parameter migration: one whose guest is not counted.
    func usages(of source: String, but migration: String) -> [GuestUsage] {
        let coming = arriving.filter { $0.key != migration && $0.value.1.source == source }.values
        let names = Set(coming.map(\.guest))
        let here = residents.filter { $0.value.source == source && !names.contains($0.key) }.values
        return coming.map(\.1.usage) + here.map(\.usage)
    }

    /// A guest is on its way.
    mutating func begin(_ migration: String, guest: String, _ arrival: GuestRecord.Arrival) {
        arriving[migration] = (guest, arrival)
    }

    /// What the guest of a migration takes.
    func arrival(_ migration: String) -> GuestRecord.Arrival? { arriving[migration]?.1 }

    /// The guest of a migration is here.
    mutating func settle(_ migration: String) {
        guard let (guest, arrival) = arriving.removeValue(forKey: migration) else { return }
        residents[guest] = arrival
    }

    /// The guest of a migration does not come.
    mutating func drop(_ migration: String) { arriving[migration] = nil }
}
