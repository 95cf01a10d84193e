internal import Emulator
internal import Glibc
internal import IO
internal import Migration

/// The process that coordinates an evacuation, apart from who watches it.
public enum EvacuationProcess {
    /// The hidden command that it runs.
    public static let command = "evacuation-agent"

    /// Writes a plan and starts the process that carries it out, in a session of its own.
    ///
    /// - Throws: `MigrationError` with `busy` when an evacuation of this host is under way; `FileError`.
    public static func start(_ evacuation: Evacuation) throws {
        let files = EvacuationFiles(stateDirectory: evacuation.order.migration.stateDirectory)
        try refuseSecond(files)
        try files.save(evacuation)
        try files.noteLatest(evacuation.id)
        try launch(evacuation.id, files, evacuation.order.migration.stateDirectory)
    }

    /// Starts a process that goes on with a plan.
    ///
    /// - Throws: `MigrationError` when there is no such plan, it is over, or somebody is at it; `FileError`.
    public static func resume(_ id: String, stateDirectory: String) throws {
        let files = EvacuationFiles(stateDirectory: stateDirectory)
        _ = try files.load(id)
        if DurableFile.exists(files.report(of: id)) {
            throw MigrationError(
                .guest,
                "Evacuation \(id) is over; 'crossdock evacuate --status \(id)' says how it went"
            )
        }
        try refuseSecond(files)
        try files.noteLatest(id)
        try launch(id, files, stateDirectory)
    }

    /// The evacuations that were begun, are not over, and that nobody coordinates.
    public static func interrupted(stateDirectory: String) -> [String] {
        let files = EvacuationFiles(stateDirectory: stateDirectory)
        if files.isCoordinated { return [] }
        return files.ids.filter { !DurableFile.exists(files.report(of: $0)) && ((try? files.load($0)) != nil) }
    }

    /// Asks an evacuation to end after the switchovers that are under way.
    ///
    /// - Throws: `MigrationError` when there is none that goes on; `FileError`.
    public static func cancel(_ id: String, stateDirectory: String) throws {
        let files = EvacuationFiles(stateDirectory: stateDirectory)
        _ = try files.load(id)
        if DurableFile.exists(files.report(of: id)) {
            throw MigrationError(.guest, "Evacuation \(id) is over; there is nothing to cancel")
        }
        try DurableFile.write([], to: files.cancellation(of: id))
        // Nobody would read it.
        if !files.isCoordinated { try launch(id, files, stateDirectory) }
    }

    /// Refuses what cannot be done while an evacuation of this host is under way.
    ///
    /// - Throws: `MigrationError` with `busy`, which names it.
    public static func refuseSecond(stateDirectory: String) throws {
        try refuseSecond(EvacuationFiles(stateDirectory: stateDirectory))
    }

    private static func refuseSecond(_ files: EvacuationFiles) throws {
        guard files.isCoordinated else { return }
        let open = (files.latest.map { [$0] } ?? []) + files.ids.reversed()
        let known = open.first { !DurableFile.exists(files.report(of: $0)) }.map { " \($0)" } ?? ""
        throw MigrationError(
            .busy,
            "An evacuation\(known) of this host is under way; 'crossdock evacuate --watch\(known)' shows it, '--cancel\(known)' ends it"
        )
    }

    private static func launch(_ id: String, _ files: EvacuationFiles, _ stateDirectory: String) throws {
        let process = try EmulatorProcess.start(
            [DurableFile.resolve("/proc/self/exe", in: "/"), command, id, "--state-dir", stateDirectory],
            directory: "/",
            log: files.log(of: id)
        )
        // From here on a second evacuation sees that there is one.
        let end = ContinuousClock.now + .seconds(10)
        while process.isRunning, !files.isCoordinated, ContinuousClock.now < end { usleep(5_000) }
    }

    /// Does the work of the process: carries a plan out, or goes on with it.
    ///
    /// - Returns: the exit code of the evacuation.
    /// - Throws: `MigrationError` with `busy` when another process is at it; `FileError`.
    public static func run(
        _ id: String,
        stateDirectory: String,
        say: @escaping @Sendable (String) -> Void
    ) async throws -> Int32 {
        let files = EvacuationFiles(stateDirectory: stateDirectory)
        guard let lock = try files.coordinate() else {
            throw MigrationError(.busy, "Another process coordinates an evacuation of this host")
        }
        let plan = try files.load(id)
        // Whoever closes a terminal ends the watching; the plan goes on.
        SignalWatcher.start([SIGHUP, SIGINT]) { _ in }
        let loop = EventLoop(name: "evacuation")
        defer { loop.stop() }
        let code = try await EvacuationConductor(plan, on: loop, say: say).run()
        withExtendedLifetime(lock) {}
        return code
    }
}
