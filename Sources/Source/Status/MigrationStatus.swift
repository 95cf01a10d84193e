internal import Emulator
internal import IO
public import Migration

/// What this host knows of one migration, in words for people: what `crossdock status` and the page show.
public struct MigrationStatus: Sendable {
    /// Which side this host is on.
    public enum Role: String, Sendable {
        /// The guest leaves, or has left.
        case source
        /// It comes, or has come.
        case destination
        /// The journal does not say.
        case unknown = "?"
    }

    /// What is wrong with it: somebody has to do something.
    public enum Trouble: String, Sendable {
        /// Released, and the other host has not confirmed that it has the guest.
        case undecided
        /// Nobody works on it, and it is not over.
        case interrupted
        /// Its journal cannot be read.
        case unreadable
        /// Both hosts may run the guest.
        case doubled
    }

    /// The migration's id.
    public let migration: String
    /// The guest's name; "?" when the journal does not say.
    public internal(set) var guest: String
    /// The other host.
    public internal(set) var peer = ""
    /// Which side this host is on.
    public internal(set) var role = Role.unknown
    /// Where it stands, a word or two: "migrating", "rolled back", "undecided".
    public internal(set) var state = ""
    /// What that means, half a sentence.
    public internal(set) var detail = ""
    /// What is wrong; nil when nothing is.
    public internal(set) var trouble: Trouble?
    /// The command that mends that; nil when there is none.
    public internal(set) var command: String?
    /// Whether the last word about the guest is spoken: nothing of this changes any more but by an operator.
    public internal(set) var isOver = false
    /// Whether a process of this host works on it, or, at its destination, its source is waited for.
    public internal(set) var isUnderWay = false
    /// The report of one that has ended; nil when there is none, as at a destination.
    public internal(set) var report: MigrationReport?
    /// How far the phase under way is.
    public internal(set) var progress: MigrationEvent?
    /// The phase under way.
    public internal(set) var phase: String?

    /// When it began, in seconds since 1970; nil for an id that does not say.
    public var began: Int? { MigrationStore.began(migration) }

    /// Reads what is known of a migration. Blocks. It takes no lock and asks nobody.
    ///
    /// - Returns: nil when there is no journal, or nothing in it.
    /// - Throws: `FileError` when the journal cannot be opened.
    public init?(of id: String, in store: MigrationStore) throws {
        let reading: JournalReading?
        do { reading = try store.reading(of: id) } catch let error as JournalError {
            self.init(unreadable: id, error)
            return
        }
        guard let reading else { return nil }
        self.init(id, reading, in: store)
    }

    private init(unreadable id: String, _ error: JournalError) {
        migration = id
        guest = error.records.first?.guest ?? "?"
        (state, detail, trouble) = ("unreadable", error.description, .unreadable)
    }

    /// Describes what a journal says.
    ///
    /// - Parameters:
    ///   - id: the migration.
    ///   - reading: its journal.
    ///   - store: where its other files are.
    public init(_ id: String, _ reading: JournalReading, in store: MigrationStore) {
        migration = id
        (guest, peer) = (reading.guest, reading.peer)
        let files = store.files(of: id)
        switch reading.standing {
        case .source(let standing):
            role = .source
            isOver = standing.isOver
            if let bytes = (try? DurableFile.read(files.report)) ?? nil {
                report = try? MigrationReport(parsing: bytes)
            }
            describe(standing, files, GuestStore(stateDirectory: store.stateDirectory))
        case .destination(let standing):
            role = .destination
            isOver = standing.isOver
            isUnderWay = !standing.isOver
            describe(standing, GuestStore(stateDirectory: store.stateDirectory))
        }
    }
}
