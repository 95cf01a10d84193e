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

    /// The latest migration of a guest on this host, in either direction.
    public func latest(of guest: String) throws -> String? {
        var last: (order: Int, id: String?) = (-1, nil)
        for id in ids() {
            switch try Journal.read(journal(of: id)).first {
            case .offered(guest, _, let order) where order > last.order: last = (order, id)
            case .accepted(guest, _, let order) where order > last.order: last = (order, id)
            default: break
            }
        }
        return last.id
    }

    /// The migration by which the guest is arriving here and does not belong to this host: its copy must not be started.
    public func arrival(of guest: String) throws -> (migration: String, source: String)? {
        guard let id = try latest(of: guest) else { return nil }
        let records = try Journal.read(journal(of: id))
        guard case .accepted(_, let source, _) = records.first, records.ownerDigests == nil, !records.isRolledBack
        else {
            return nil
        }
        return (id, source)
    }

    /// Which migration took the guest away from this host, if its last word here is RELEASED: the guest must not be
    /// started here then.
    public func release(of guest: String) throws -> (migration: String, destination: String)? {
        var last: (order: Int, release: (migration: String, destination: String)?) = (-1, nil)
        for id in ids() {
            let records = try Journal.read(journal(of: id))
            switch records.first {
            case .offered(guest, let destination, let order) where order > last.order:
                if records.contains(.released), !records.isRolledBack { last = (order, (id, destination)) }
            case .accepted(guest, _, let order) where order > last.order:
                if records.ownerDigests != nil { last = (order, nil) }
            default: break
            }
        }
        return last.release
    }

    /// The number of the next migration of this host.
    public func nextOrder() throws -> Int {
        var next = 0
        for id in ids() {
            switch try Journal.read(journal(of: id)).first {
            case .offered(_, _, let order), .accepted(_, _, let order): next = max(next, order + 1)
            default: break
            }
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

/// An exclusive lock on a file that ends with the process.
public final class FileLock: Sendable {
    private let fd: Int32

    /// Takes the lock; nil when somebody else has it.
    public init?(_ path: String) throws {
        let fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
        guard fd >= 0 else { throw ChannelError.system("open the lock \(path)", errno) }
        guard xd_flock_exclusive(fd) == 0 else {
            close(fd)
            return nil
        }
        self.fd = fd
    }

    deinit { close(fd) }
}
