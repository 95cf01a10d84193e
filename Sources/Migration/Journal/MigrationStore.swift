internal import CLinux
internal import FoundationEssentials
internal import Glibc
internal import IO

/// The migrations of a state directory: `migrations/ID/` with the journal, the events and the report.
public struct MigrationStore: Sendable {
    /// The directory with one directory for each migration.
    public let directory: String

    /// Makes a store under a state directory.
    public init(stateDirectory: String) { directory = "\(stateDirectory)/migrations" }

    /// A migration's directory.
    public func directory(of id: String) -> String { "\(directory)/\(id)" }
    /// A migration's journal.
    public func journal(of id: String) -> String { "\(directory)/\(id)/journal" }
    /// What happened so far, one JSON event a line.
    public func events(of id: String) -> String { "\(directory)/\(id)/events.jsonl" }
    /// The report of a migration that has ended.
    public func report(of id: String) -> String { "\(directory)/\(id)/report.json" }

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

    /// The records of every migration of a guest. A journal that cannot be read counts unless it is known to be about another
    /// guest.
    private func journals(of guest: String) throws -> [(id: String, records: [JournalRecord])] {
        var found: [(String, [JournalRecord])] = []
        for id in ids() {
            do {
                let records = try Journal.read(journal(of: id))
                if records.first?.guest == guest { found.append((id, records)) }
            } catch let error as JournalError {
                if error.records.isEmpty || error.records.first?.guest == guest { throw error }
            }
        }
        return found.sorted { Self.order($0.1) < Self.order($1.1) }
    }

    private static func order(_ records: [JournalRecord]) -> Int {
        switch records.first {
        case .offered(_, _, let order), .accepted(_, _, let order): order
        default: -1
        }
    }

    /// The latest migration of a guest on this host, in either direction.
    public func latest(of guest: String) throws -> String? { try journals(of: guest).last?.id }

    /// The migration by which the guest is arriving here and does not belong to this host: its copy must not be started.
    public func arrival(of guest: String) throws -> (migration: String, source: String)? {
        guard let (id, records) = try journals(of: guest).last, case .accepted(_, let source, _) = records.first,
            records.ownerDigests == nil, !records.isRolledBack
        else { return nil }
        return (id, source)
    }

    /// Which migration took the guest away from this host, if its last word here is RELEASED: the guest must not be
    /// started here then.
    public func release(of guest: String) throws -> (migration: String, destination: String)? {
        for (id, records) in try journals(of: guest).reversed() {
            if case .offered(_, let destination, _) = records.first {
                if records.isReleased { return (id, destination) }
                // The guest was here, and the operator or the other side has said that it stays.
                if records.contains(.released) { return nil }
            }
            if records.ownerDigests != nil { return nil }
        }
        return nil
    }

    /// The number of the next migration of this host.
    public func nextOrder() throws -> Int {
        var next = 0
        for id in ids() {
            let records: [JournalRecord]
            do { records = try Journal.read(journal(of: id)) } catch let error as JournalError {
                records = error.records
            }
            next = max(next, Self.order(records) + 1)
        }
        return next
    }

    /// Takes the lock that keeps two migrations of one guest apart; nil when it is taken.
    ///
    /// The lock ends with the descriptor, so with its process.
    public func lock(guest: String) throws -> FileLock? {
        try DurableFile.makeDirectory(directory)
        return try FileLock("\(directory)/../guest-\(guest).lock")
    }
}
