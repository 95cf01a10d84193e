public import Emulator
internal import IO
internal import Migration

/// What begins and ends a guest on this host, as far as the journals of its migrations let it.
public struct GuestLife: Sendable {
    let guests: GuestStore
    let migrations: MigrationStore

    /// Looks after the guests of a state directory.
    public init(stateDirectory: String) {
        guests = GuestStore(stateDirectory: stateDirectory)
        migrations = MigrationStore(stateDirectory: stateDirectory)
    }

    /// Keeps migrations and other commands away from a guest, as long as the lock is there.
    func lock(_ name: String) throws -> FileLock {
        try GuestStore.validate(name)
        guard let lock = try migrations.lock(guest: name) else {
            throw MigrationError(.busy, "Guest '\(name)' is being migrated; see 'crossdock status'")
        }
        return lock
    }

    // MARK: beginning

    /// A guest that was started.
    public struct Started: Sendable {
        /// Its QEMU.
        public var process: Int32
        /// What its operator has to know, a sentence.
        public var warning: String?
    }

    /// Starts a guest.
    ///
    /// - Parameters:
    ///   - name: its name.
    ///   - commandLine: its QEMU command line as the user wrote it; nil for the one that is known.
    /// - Throws: `GuestError` when it may not or cannot be started: what was known of it stays, and what never ran is not kept.
    ///   `MigrationError.busy` when somebody moves it.
    public func start(_ name: String, _ commandLine: GuestCommandLine?) async throws -> Started {
        let lock = try lock(name)
        defer { withExtendedLifetime(lock) {} }
        if let bar = try migrations.startBar(of: name) { throw GuestError(bar.sentence(guest: name)) }
        if let stray = StrayImages.obstacles(of: name, migrations).first { throw GuestError(stray) }
        var known = try guests.load(name)
        // What is left of an agent that was to move it while it was off.
        if var off = known, off.isOff == true {
            try await guests.switchOff(&off)
            known = off
        }
        if let known, let process = known.process, process.isRunning {
            throw GuestError("Guest '\(name)' runs already, as process \(process.pid)")
        }
        let described = try description(name, commandLine, known)
        // The agent starts QEMU itself and keeps it; what would detach it or name it is left out.
        let arguments = try described.commandLine.relocated(isAtHome: true) { .init(path: $0.path) }.arguments
        let isPaused = described.commandLine.has("S")
        var record = GuestRecord(
            name: name,
            commandLine: GuestCommandLine(arguments: arguments, directory: described.commandLine.directory)
        )
        // A guest whose command line another host wrote stays confined.
        record.confinement = described.confinement
        record.arrival = described.arrival
        record.taps = described.taps
        record.placement = known?.placement
        record.origin = known?.origin
        record.lineages = described.lineages
        return try await launch(record, isPaused: isPaused, former: known)
    }

    /// What a guest is: what its user has just said, or what is known.
    private func description(_ name: String, _ commandLine: GuestCommandLine?, _ known: GuestRecord?) throws
        -> GuestRecord
    {
        guard let commandLine else {
            guard let known else {
                let others = guests.names()
                throw GuestError(
                    "There is no guest '\(name)'; give its QEMU command line after '--'"
                        + (others.isEmpty
                            ? "" : ", or the name of one that is known: \(others.joined(separator: ", "))")
                )
            }
            if let secrets = known.secrets {
                throw GuestError(
                    "Guest '\(name)' needs the secrets \(secrets.joined(separator: ", ")), which are kept nowhere; give its "
                        + "command line again after '--', with an -object secret,id=ID,file=FILE for each"
                )
            }
            if known.adopted != nil {
                throw GuestError(
                    "Guest '\(name)' was started by something else, and is for that to start again; to start it here, give "
                        + "its command line after '--'"
                )
            }
            return known
        }
        _ = try commandLine.paths()
        if let secret = commandLine.clearSecrets.first {
            throw GuestError(
                "The secret '\(secret)' is in the command line in clear, where everybody on this host can read it; use "
                    + "file=, or encrypt it with 'crossdock secret encrypt'"
            )
        }
        return GuestRecord(name: name, commandLine: commandLine)
    }

    private func launch(_ record: GuestRecord, isPaused: Bool, former: GuestRecord?) async throws -> Started {
        let (guests, name) = (guests, record.name)
        let loop = EventLoop(name: "guest")
        defer { loop.stop() }
        return try await loop.run {
            var started = record
            let monitor: QMPClient
            do { monitor = try await guests.start(&started, extra: isPaused ? ["-S"] : [], on: loop) } catch {
                if let former { try? guests.save(former) } else { guests.remove(name) }
                throw error
            }
            monitor.close()
            guard let process = started.process else { throw GuestError("QEMU of guest '\(name)' has no process") }
            return Started(process: process.pid, warning: await GuestScope.place(name, process))
        }
    }

    /// What became of a guest that is to run whenever its host does.
    public enum Autostart: Sendable {
        /// It was started, or would be.
        case started(guest: String)
        /// It is not for this host to start, or runs; the sentence says which.
        case skipped(guest: String, reason: String)
        /// It could not be started.
        case failed(guest: String, reason: String)
    }

    /// Starts every guest that is set to be started with its host and belongs to this one, after a restart of the host.
    ///
    /// - Parameter onlyLooks: whether nothing is started.
    /// - Returns: what became of each, by name.
    public func autostart(onlyLooks: Bool = false) async -> [Autostart] {
        var results: [Autostart] = []
        for name in guests.names() {
            guard let record = (try? guests.load(name)) ?? nil, record.placement?.autostart == true else { continue }
            do {
                // The journals decide, not the record.
                if let bar = try migrations.startBar(of: name) {
                    results.append(.skipped(guest: name, reason: bar.sentence(guest: name)))
                } else if record.process?.isRunning == true, record.isOff != true {
                    results.append(.skipped(guest: name, reason: "Guest '\(name)' runs already"))
                } else {
                    if !onlyLooks { _ = try await start(name, nil) }
                    results.append(.started(guest: name))
                }
            } catch { results.append(.failed(guest: name, reason: "\(error)")) }
        }
        return results
    }

    // MARK: ending

    /// How a guest is ended.
    public enum End: Sendable, Hashable {
        /// It is asked (ACPI), and has so long to shut down.
        case asking(Duration)
        /// Its QEMU ends, as if the power were cut.
        case force
    }

    /// Ends a guest.
    ///
    /// - Returns: whether there was a QEMU to end.
    /// - Throws: `GuestError` when it has not shut down, and goes on; `MigrationError.busy` when somebody moves it.
    public func stop(_ name: String, _ end: End) async throws -> Bool {
        guard let record = try guests.load(name) else { throw guests.unknown(name) }
        let lock: FileLock
        do { lock = try self.lock(name) } catch let error as MigrationError where error.code == .busy {
            // An agent that cannot have it resumed holds on to it, and goes on once its QEMU has ended.
            guard end == .force, try migrations.hasArrived(name), let process = record.process, process.isRunning else {
                throw error
            }
            await process.terminate()
            return true
        }
        defer { withExtendedLifetime(lock) {} }
        guard let process = record.process, process.isRunning else { return false }
        let bar = try migrations.startBar(of: name)
        // What must not run here may be what the other host waits for.
        if let bar, !bar.isDecided { throw GuestError(bar.sentence(guest: name)) }
        let guests = guests
        let loop = EventLoop(name: "guest")
        defer { loop.stop() }
        // Nobody is at home in what a guest has left behind.
        guard case .asking(let patience) = end, bar == nil else {
            try await loop.run { await guests.stop(record, on: loop) }
            return true
        }
        try await loop.run {
            let state = await guests.state(of: record, on: loop)
            guard state == RunState.running.rawValue || state == RunState.suspended.rawValue else {
                throw GuestError(
                    "Guest '\(name)' is not asked to shut down, since it would not hear that: its state is '\(state)'. "
                        + "'crossdock guest stop \(name) --force' ends it as if its power were cut"
                )
            }
            guard try await guests.shutDown(record, patience: patience, on: loop) else {
                throw GuestError(
                    "Guest '\(name)' was asked to shut down and has not within \(patience.components.seconds) s; it goes on. "
                        + "'crossdock guest stop \(name) --force' ends it as if its power were cut"
                )
            }
        }
        return true
    }

    /// Forgets a guest that belongs to this host and does not run. Its images stay.
    ///
    /// - Returns: the images that it had.
    /// - Throws: `GuestError` when it runs, or does not belong to this host; `MigrationError.busy` when somebody moves it.
    public func remove(_ name: String) throws -> [String] {
        guard let record = try guests.load(name) else { throw guests.unknown(name) }
        let lock = try lock(name)
        defer { withExtendedLifetime(lock) {} }
        if let bar = try migrations.startBar(of: name) {
            let advice = bar.isDecided ? ". 'crossdock guest forget \(name)' removes what it has left here" : ""
            throw GuestError(bar.sentence(guest: name) + advice)
        }
        if let stray = StrayImages.obstacles(of: name, migrations).first { throw GuestError(stray) }
        if let process = record.process, process.isRunning {
            throw GuestError(
                record.adopted == nil
                    ? "Guest '\(name)' runs, as process \(process.pid); end it first with 'crossdock guest stop \(name)'"
                    : "Guest '\(name)' runs, as process \(process.pid), and was started by something else; it is removed once that has "
                        + "ended it"
            )
        }
        let images = (try? record.commandLine.paths()) ?? []
        guests.remove(name)
        return images.filter { $0.kind == .disk }.map(\.path).filter(DurableFile.exists)
    }
}
