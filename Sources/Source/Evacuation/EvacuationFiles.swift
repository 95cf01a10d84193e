internal import Emulator
internal import Glibc
internal import IO
internal import Migration

/// The evacuations of a state directory, `evacuations/ID/`: every name that there is.
public struct EvacuationFiles: Sendable {
    /// The directory with one directory for each evacuation.
    public let directory: String

    /// Makes the names under a state directory.
    public init(stateDirectory: String) { directory = "\(stateDirectory)/evacuations" }

    /// The ids, the earliest first.
    public var ids: [String] { DurableFile.list(directory).filter { DurableFile.exists(plan(of: $0)) } }
    /// The one that was begun or gone on with last; nil when there was none. Its id need not be the highest: that says when the look before it
    /// began, and ids of one second are in any order.
    public var latest: String? {
        let noted = ((try? DurableFile.read(note, limit: 64)) ?? nil).map { String(decoding: $0, as: UTF8.self) }
        if let noted, MigrationStore.isID(noted), DurableFile.exists(plan(of: noted)) { return noted }
        return ids.last
    }

    /// An evacuation's directory.
    public func directory(of id: String) -> String { "\(directory)/\(id)" }
    /// What is to be done and how far that is, durable.
    public func plan(of id: String) -> String { "\(directory(of: id))/plan.json" }
    /// What happened, one JSON event a line.
    public func events(of id: String) -> String { "\(directory(of: id))/events.jsonl" }
    /// How far it is at the moment, for who watches; not durable.
    public func progress(of id: String) -> String { "\(directory(of: id))/progress.json" }
    /// How it went.
    public func report(of id: String) -> String { "\(directory(of: id))/report.json" }
    /// What its coordinator said.
    public func log(of id: String) -> String { "\(directory(of: id))/agent.log" }
    /// That the operator wants it to end.
    public func cancellation(of id: String) -> String { "\(directory(of: id))/cancelled" }

    /// Held by who coordinates an evacuation of this host: one at a time.
    private var lock: String { "\(directory)/lock" }
    /// Who that is.
    private var coordinator: String { "\(directory)/coordinator.json" }
    /// Which one was begun or gone on with last.
    private var note: String { "\(directory)/latest" }
    /// Held by the source agent of the guest whose turn it is to switch over.
    private var turn: String { "\(directory)/turn" }

    /// Takes one of so many places for a copy from this host; nil when other guests have them all. It ends with its last reference, or with
    /// the process.
    ///
    /// - Throws: `FileError`.
    func takePlace(of places: Int) throws -> FileLock? {
        try DurableFile.makeDirectory(directory)
        for place in 0..<places {
            if let lock = try FileLock("\(directory)/copy-\(place)") { return lock }
        }
        return nil
    }

    /// Takes the right to coordinate, and says who has it; nil when somebody else has it.
    ///
    /// - Throws: `FileError`.
    func coordinate() throws -> FileLock? {
        try DurableFile.makeDirectory(directory)
        guard let lock = try FileLock(lock) else { return nil }
        if let own = EmulatorProcess(pid: getpid()) { try DurableFile.write(JSONText.encode(own), to: coordinator) }
        return lock
    }

    /// Whether an evacuation of this host is coordinated by a process that lives.
    public var isCoordinated: Bool {
        guard let bytes = (try? DurableFile.read(coordinator)) ?? nil,
            let process = JSONText.decode(EmulatorProcess.self, from: bytes)
        else { return false }
        return process.isRunning
    }

    /// Takes the turn to switch over from this host; nil when another guest has it. It ends with its last reference, or with the process.
    ///
    /// - Throws: `FileError`.
    func takeTurn() throws -> FileLock? {
        try DurableFile.makeDirectory(directory)
        return try FileLock(turn)
    }

    /// What tells the copies of this host that one of its guests is paused.
    ///
    /// - Throws: `FileError`.
    func beacon() throws -> PauseBeacon {
        try DurableFile.makeDirectory(directory)
        return try PauseBeacon("\(directory)/pause")
    }

    /// Notes durably that an evacuation is begun or gone on with.
    ///
    /// - Throws: `FileError`.
    func noteLatest(_ id: String) throws { try DurableFile.write(Array(id.utf8), to: note) }

    /// The plan of an evacuation.
    ///
    /// - Throws: `MigrationError` when there is none, or it cannot be understood.
    public func load(_ id: String) throws -> Evacuation {
        guard MigrationStore.isID(id), let bytes = try DurableFile.read(plan(of: id)) else {
            let known = ids.joined(separator: ", ")
            throw MigrationError(
                .guest,
                "There is no evacuation '\(id)' on this host" + (known.isEmpty ? "" : "; there are: \(known)")
            )
        }
        guard let plan = Evacuation(parsing: bytes), plan.id == id else {
            throw MigrationError(
                .undecided,
                "\(plan(of: id)) is damaged, or was written by another version. What became of its guests 'crossdock status' says; "
                    + "begin a new evacuation for those that are still here"
            )
        }
        return plan
    }

    /// Writes a plan durably.
    ///
    /// - Throws: `FileError`.
    func save(_ evacuation: Evacuation) throws {
        try DurableFile.makeDirectory(directory(of: evacuation.id))
        try DurableFile.write(evacuation.encoded(), to: plan(of: evacuation.id))
    }
}
