internal import IO

/// The files of one migration, `migrations/ID/` of a state directory: every name that there is.
public struct MigrationFiles: Sendable, Hashable {
    /// The directory.
    public let directory: String

    /// Names the files in a directory.
    init(directory: String) { self.directory = directory }

    /// The processes that may work on a migration at its source, each of which leaves its identity while it does.
    public enum Role: String, Sendable, CaseIterable {
        /// The source agent.
        case agent
        /// Who acts when that dies.
        case watchdog
        /// Who recovers the migration.
        case recovery
        /// Who keeps others from block devices that the guest has left.
        case holder
    }

    /// What is decided, durably.
    public var journal: String { "\(directory)/journal" }
    /// What happened so far, one JSON event a line.
    public var events: String { "\(directory)/events.jsonl" }
    /// How far it is, the latest event of that kind, for who looks in between; of no use after a crash.
    public var progress: String { "\(directory)/progress.json" }
    /// The report of a migration that has ended.
    public var report: String { "\(directory)/report.json" }
    /// Source: what the operator asked for.
    public var plan: String { "\(directory)/plan.json" }
    /// Source: the disks, for who recovers the migration.
    public var disks: String { "\(directory)/disks.json" }
    /// Source: what the guest was doing, apart from the migration, for who recovers it.
    public var guest: String { "\(directory)/guest.json" }
    /// Source: the images that are kept, and until when.
    public var fenced: String { "\(directory)/fenced.json" }
    /// Destination: what a later agent needs to take the migration up.
    public var incoming: String { "\(directory)/incoming.json" }
    /// Destination: what the source says of the disks.
    public var proofs: String { "\(directory)/proofs.json" }
    /// Which process it is that works on the migration in this role.
    public func process(_ role: Role) -> String { "\(directory)/\(role.rawValue).json" }
    /// What that process said.
    public func log(_ role: Role) -> String { "\(directory)/\(role.rawValue).log" }
    /// Source: where QEMU's mirror of a disk connects to. One life of an agent only.
    public func mirrorSocket(of disk: String) -> String { "\(directory)/\(disk).sock" }
    /// Source: where QEMU sends the memory to, at each attempt anew.
    public func streamSocket(attempt: Int) -> String { "\(directory)/stream\(attempt).sock" }
    /// The sockets that are there.
    public var sockets: [String] {
        DurableFile.list(directory).filter { $0.hasSuffix(".sock") }.map { "\(directory)/\($0)" }
    }
}
