internal import CLinux
internal import FoundationEssentials
internal import Glibc
internal import IO

/// The migrations of a state directory: `migrations/ID/` with the journal, the events and the report.
public struct MigrationStore: Sendable {
    /// The state directory.
    public let stateDirectory: String
    /// The directory with one directory for each migration.
    public let directory: String

    /// Makes a store under a state directory.
    public init(stateDirectory: String) {
        self.stateDirectory = stateDirectory
        directory = "\(stateDirectory)/migrations"
    }

    /// A migration's directory.
    public func directory(of id: String) -> String { "\(directory)/\(id)" }
    /// A migration's journal.
    public func journal(of id: String) -> String { files(of: id).journal }

    /// The ids.
    public func ids() -> [String] { DurableFile.list(directory) }

    /// A new id: the time in seconds and something random, fit for file and socket names.
    public static func makeID() -> String {
        let random = (0..<3).map { _ in UInt8.random(in: 0...255) }
        return "\(time(nil))-" + random.map { String($0 >> 4, radix: 16) + String($0 & 15, radix: 16) }.joined()
    }

    /// Whether a text could be an id, so that a peer cannot name files with it.
    public static func isID(_ text: String) -> Bool {
        !text.isEmpty && text.utf8.count <= 40
            && text.utf8.allSatisfy { ($0 >= 48 && $0 <= 57) || ($0 >= 97 && $0 <= 122) || $0 == 45 }
    }

    /// When a migration began, in seconds since 1970: its id begins with that. Nil for an id of another kind.
    public static func began(_ id: String) -> Int? { id.split(separator: "-").first.flatMap { Int($0) } }

    /// The files of a migration.
    public func files(of id: String) -> MigrationFiles { MigrationFiles(directory: directory(of: id)) }

    /// What a migration's journal says; nil when there is none, or nothing in it.
    ///
    /// - Throws: `JournalError` when it cannot be understood.
    public func reading(of id: String) throws -> JournalReading? { JournalReading(try Journal.read(journal(of: id))) }

    /// What the journals of a guest say, the earliest first. A journal that cannot be read counts unless it is known to be about
    /// another guest.
    private func readings(of guest: String) throws -> [(id: String, reading: JournalReading)] {
        var found: [(id: String, reading: JournalReading)] = []
        for id in ids() {
            do {
                if let reading = try reading(of: id), reading.guest == guest { found.append((id, reading)) }
            } catch let error as JournalError {
                if error.records.isEmpty || error.records.first?.guest == guest { throw error }
            }
        }
        return found.sorted { $0.reading.order < $1.reading.order }
    }

    /// Whether a later migration of the same guest has decided about it: the guest came, or is about to come, to this host
    /// again, or left it once more. What an unrelated host has only offered decides nothing.
    public func isSuperseded(_ id: String, of guest: String) throws -> Bool {
        let readings = try readings(of: guest)
        guard let index = readings.firstIndex(where: { $0.id == id }) else { return false }
        return readings[(index + 1)...].contains { $0.reading.supersedes }
    }

    /// Why a guest must not be started on this host.
    public enum StartBar: Sendable, Hashable {
        /// It was released to another host, which may not have confirmed it.
        case released(migration: String, destination: String, isConfirmed: Bool)
        /// An operator of another host has taken it for that.
        case overruled(migration: String, peer: String, by: String)
        /// It is on its way to this host and does not belong to it yet.
        case arriving(migration: String, source: String)

        /// Whether the guest certainly belongs to another host, which needs nothing of what is left here.
        public var isDecided: Bool {
            switch self {
            case .released(_, _, let isConfirmed): isConfirmed
            case .overruled: true
            case .arriving: false
            }
        }

        /// What an operator is told who wants to do something with the guest here.
        public func sentence(guest: String) -> String {
            switch self {
            case .released(let migration, let destination, true):
                "Guest '\(guest)' has moved to \(destination) by migration \(migration) and belongs to that host now"
            case .released(let migration, let destination, false):
                "Guest '\(guest)' was released to \(destination) by migration \(migration), which has not confirmed that it runs "
                    + "there; until that is known, nobody may use it here. 'crossdock recover \(migration)' asks \(destination)"
            case .overruled(let migration, let peer, let by):
                "Guest '\(guest)' of migration \(migration) belongs to \(peer) by the word of \(by)"
            case .arriving(let migration, let source):
                "Guest '\(guest)' is arriving from \(source) by migration \(migration) and does not belong to this host yet; "
                    + "'crossdock destination' finishes that or cleans up"
            }
        }
    }

    /// Whether a guest may be started on this host: nil when it may.
    ///
    /// - Throws: `JournalError` when a journal that may be about the guest cannot be understood.
    public func startBar(of guest: String) throws -> StartBar? { Self.startBar(by: try readings(of: guest)) }

    /// Whether a guest may be started by what its journals say: nil when it may.
    ///
    /// - Parameter readings: those of all its migrations, the earliest first.
    public static func startBar(by readings: [(id: String, reading: JournalReading)]) -> StartBar? {
        for (id, reading) in readings.reversed() {
            switch reading.standing {
            case .source(.released):
                return .released(migration: id, destination: reading.peer, isConfirmed: false)
            case .source(.confirmed):
                return .released(migration: id, destination: reading.peer, isConfirmed: true)
            case .source(.overruled(let by)), .destination(.overruled(let by)):
                return .overruled(migration: id, peer: reading.peer, by: by)
            case .destination(.accepted), .destination(.prepared):
                return .arriving(migration: id, source: reading.peer)
            // It is here, or the other side or the operator has said that it stays.
            case .destination(.owner), .destination(.taken), .source(.reclaimed), .source(.taken): return nil
            case .source(.rolledBack) where reading.wasReleased: return nil
            case .source(.open), .source(.rolledBack), .destination(.rolledBack): continue
            }
        }
        return nil
    }

    /// Whether there was a migration of a guest.
    public func knows(_ guest: String) throws -> Bool { try !readings(of: guest).isEmpty }

    /// Whether the last that is known of a guest is that it came here and belongs to this host.
    public func hasArrived(_ guest: String) throws -> Bool {
        switch try readings(of: guest).last?.reading.standing {
        case .destination(.owner), .destination(.taken): true
        default: false
        }
    }

    /// The number of the next migration of this host.
    public func nextOrder() throws -> Int {
        var next = 0
        for id in ids() {
            let records: [JournalRecord]
            do { records = try Journal.read(journal(of: id)) } catch let error as JournalError {
                records = error.records
            }
            next = max(next, (JournalReading(records)?.order ?? -1) + 1)
        }
        return next
    }

    /// Removes what is known of migrations that a peer offered to this host and that were given up before everything was here:
    /// nobody is in doubt about them. The latest stay, for whoever wants to know why.
    ///
    /// - Parameters:
    ///   - peer: whose offers.
    ///   - latest: how many stay.
    /// - Returns: the ids of those that are gone.
    @discardableResult
    public func forgetRefused(of peer: String, keeping latest: Int) -> [String] {
        let ids = ids()
        guard ids.count > latest else { return [] }
        var refused: [(id: String, order: Int)] = []
        for id in ids {
            guard let reading = try? reading(of: id), reading.peer == peer, !reading.wasPrepared,
                case .destination(.rolledBack) = reading.standing
            else { continue }
            refused.append((id, reading.order))
        }
        let old = refused.sorted { $0.order < $1.order }.dropLast(latest).map(\.id)
        for id in old { DurableFile.remove(directory(of: id)) }
        return old
    }

    /// Takes the lock that keeps two migrations of one guest apart; nil when it is taken.
    ///
    /// The lock ends with the descriptor, so with its process.
    public func lock(guest: String) throws -> FileLock? {
        try DurableFile.makeDirectory(directory)
        // Names of guests come from sources, too: a file for each would be left for ever.
        return try FileLock("\(directory)/../guest-\(guest).lock", isRemoved: true)
    }
}
