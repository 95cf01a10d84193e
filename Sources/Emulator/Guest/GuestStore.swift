internal import Glibc
public import IO

/// The guests of a state directory: `guests/NAME/guest.json` and what belongs to the guest's QEMU.
public struct GuestStore: Sendable {
    /// The directory with one directory for each guest.
    public let directory: String

    /// Makes a store under a state directory.
    public init(stateDirectory: String) { directory = "\(stateDirectory)/guests" }

    /// Where a guest's files are.
    public func directory(of name: String) -> String { "\(directory)/\(name)" }
    /// The monitor that an agent uses.
    public func agentMonitor(of name: String) -> String { "\(directory)/\(name)/qmp.sock" }
    /// The monitor for a quick look while an agent uses the other one.
    public func statusMonitor(of name: String) -> String { "\(directory)/\(name)/status.sock" }
    /// The monitor that an agent uses: the guest's own when something else started it.
    public func agentMonitor(of record: GuestRecord) -> String { record.adopted ?? agentMonitor(of: record.name) }
    /// The monitor for a quick look; an adopted guest may have none but the agent's.
    public func statusMonitor(of record: GuestRecord) -> String { record.adopted ?? statusMonitor(of: record.name) }
    /// Which of a guest's monitors is meant.
    public enum Monitor: Sendable {
        /// That of an agent.
        case agent
        /// That for a quick look.
        case status
    }

    /// Connects to a guest's monitor.
    ///
    /// - Parameters:
    ///   - record: the guest.
    ///   - monitor: which one.
    ///   - loop: the caller's loop.
    ///   - timeout: the time allowed for the greeting.
    /// - Throws: `GuestError` at once when its QEMU is frozen, which would never answer; what `QMPClient` throws.
    public func connect(
        to record: GuestRecord,
        _ monitor: Monitor = .agent,
        on loop: EventLoop,
        timeout: Duration = .seconds(10)
    ) async throws -> QMPClient {
        func refuseFrozen() throws {
            guard let process = record.process, process.isFrozen else { return }
            throw GuestError(
                "QEMU of guest '\(record.name)' (process \(process.pid)) is frozen and answers nobody; 'crossdock guest list' says why"
            )
        }
        try refuseFrozen()
        let path = monitor == .agent ? agentMonitor(of: record) : statusMonitor(of: record)
        do {
            return try await QMPClient.connect(to: path, on: loop, timeout: timeout)
        } catch {
            // Its threads stop one after the other: it may have been frozen already when it did not look so yet.
            try refuseFrozen()
            throw error
        }
    }

    /// Where the sockets of a guest are that is on its way to this host and does not belong to it yet.
    ///
    /// QEMU remembers a `cont` that it hears while it waits for a guest, from whichever monitor, and starts the guest by itself once
    /// it has all of it. So nobody finds a monitor in its usual place before `openMonitors`.
    public func arrivals(of name: String) -> String { "\(directory.dropLast("/guests".count))/new/guests/\(name)" }
    /// The monitor that an agent uses while the guest is on its way.
    public func arrivalMonitor(of name: String) -> String { "\(arrivals(of: name))/qmp.sock" }
    /// The directory of what a guest makes: logs, sockets, and what is made for it later.
    public func runDirectory(of name: String) -> String { "\(directory)/\(name)/run" }
    /// What is left of that from the guest's stay before.
    func earlierRun(of name: String) -> String { "\(directory)/\(name)/run.before" }
    /// The lock of whoever exports the guest's disks.
    public func exportLock(of name: String) -> String { "\(directory)/\(name)/export.lock" }
    /// Where an export's private directory is noted while the export is there.
    public func exportRecord(of name: String) -> String { "\(directory)/\(name)/export" }
    /// Where snapshots keep what guests overwrite.
    public var scratchDirectory: String { "\(directory.dropLast("/guests".count))/scratch" }
    /// QEMU's output.
    public func log(of name: String) -> String { "\(directory)/\(name)/qemu.log" }

    /// Checks a guest's name: letters, digits, `.`, `_` and `-`, at most 48, not beginning with a dot or a dash.
    public static func validate(_ name: String) throws {
        let allowed = name.utf8.allSatisfy {
            ($0 >= 48 && $0 <= 57) || ($0 >= 65 && $0 <= 90) || ($0 >= 97 && $0 <= 122) || [45, 46, 95].contains($0)
        }
        guard allowed, !name.isEmpty, name.utf8.count <= 48, name.first != ".", name.first != "-" else {
            throw GuestError(
                "'\(name)' is no name for a guest: use up to 48 letters, digits, '.', '_' and '-', not first '.' or '-'"
            )
        }
    }

    /// The guest of a name; nil when it is not known here.
    public func load(_ name: String) throws -> GuestRecord? {
        try Self.validate(name)
        let path = "\(directory(of: name))/guest.json"
        guard let bytes = try DurableFile.read(path) else { return nil }
        guard let record = JSONText.decode(GuestRecord.self, from: bytes) else {
            throw GuestError("\(path) is damaged; start the guest again under this name once it is repaired or removed")
        }
        return record
    }

    /// Saves a record durably.
    public func save(_ record: GuestRecord) throws {
        try Self.validate(record.name)
        try DurableFile.makeDirectory(directory(of: record.name))
        try DurableFile.write(try JSONText.encode(record, pretty: true), to: "\(directory(of: record.name))/guest.json")
    }

    /// Forgets a guest that does not run.
    public func remove(_ name: String) {
        forget(name)
        DurableFile.remove(directory(of: name))
    }

    /// Forgets a guest that did not arrive after all: what an earlier stay here has left is where it was before.
    ///
    /// - Parameters:
    ///   - name: the guest, which does not run.
    ///   - previous: its record from before; nil when there was none.
    public func remove(arriving name: String, restoring previous: GuestRecord?) {
        forget(name)
        let paths = DurableFile.list(directory(of: name)).map { "\(directory(of: name))/\($0)" }
        for path in paths where path != earlierRun(of: name) { DurableFile.remove(path) }
        if let previous { try? save(previous) }
        restoreOutputs(of: name)
        // Where nothing was, nothing stays.
        rmdir(directory(of: name))
    }

    private func forget(_ name: String) {
        if let record = (try? load(name)) ?? nil { removeTaps(of: record) }
        removeArrivals(of: name)
    }

    /// Removes the tap interfaces that were made for a guest whose QEMU has ended; its next start makes them again.
    public func removeTaps(of record: GuestRecord) { for tap in record.taps ?? [] { tap.remove(for: record.name) } }

    private func makeTaps(of record: GuestRecord) async throws {
        guard let taps = record.taps, !taps.isEmpty else { return }
        // Whoever has to clean up finds in the record what there may be.
        try save(record)
        let (name, owner) = (record.name, record.confinement?.policy.user ?? geteuid())
        try await BlockingPool.shared.run { for tap in taps { try tap.make(for: name, owner: owner) } }
    }

    /// Removes the sockets of a QEMU that waited for a guest and has ended.
    public func removeArrivals(of name: String) { DurableFile.remove(arrivals(of: name)) }

    /// The names of all guests.
    public func names() -> [String] {
        DurableFile.list(directory).filter { DurableFile.exists("\(directory)/\($0)/guest.json") }
    }

    /// What is said when there is no guest of a name: those that there are.
    public func unknown(_ name: String) -> GuestError {
        let known = names()
        let shown =
            known.prefix(20).joined(separator: ", ") + (known.count > 20 ? " and \(known.count - 20) others" : "")
        // The guests of a host are root's as a rule, and another user has a state directory of his own.
        let usual = "/var/lib/crossdock"
        let other =
            geteuid() != 0 && directory != "\(usual)/guests" && DurableFile.exists(usual)
            ? "; root's are in \(usual), ask as root" : ""
        return GuestError(
            "There is no guest '\(name)' on this host"
                + (known.isEmpty
                    ? "; start one with 'crossdock guest start', or take up a running QEMU with 'crossdock guest adopt'\(other)"
                    : "; there are: \(shown)\(other)")
        )
    }

    /// Starts a guest's QEMU and waits until its monitor answers.
    ///
    /// The process belongs to no session and survives the caller. Two monitors are added to the command line.
    ///
    /// - Parameters:
    ///   - record: the guest; its process is filled in and the record saved.
    ///   - extra: further arguments of this start only: `-incoming defer`.
    ///   - key: the guest's secrets.
    ///   - isArriving: whether the guest belongs to another host still, so that its sockets are kept away from others. A guest that
    ///     came confined is confined again.
    ///   - loop: the caller's loop.
    /// - Returns: the agent's monitor, connected.
    /// - Throws: `GuestError` with QEMU's own words when it ends at once.
    public func start(
        _ record: inout GuestRecord,
        extra: [String] = [],
        key: MasterKey? = nil,
        isArriving: Bool = false,
        on loop: EventLoop
    ) async throws -> QMPClient {
        let name = record.name
        let program = record.commandLine.arguments[0]
        guard EmulatorProcess.find(program) != nil else {
            throw GuestError("The QEMU program '\(program)' is not installed on this host")
        }
        try DurableFile.makeDirectory(directory(of: name))
        guard statusMonitor(of: name).utf8.count < 104 else {
            throw GuestError("The path \(statusMonitor(of: name)) is too long for a socket; use a shorter --state-dir")
        }
        // QEMU may make sockets where the record is not, so that it cannot put another one in its place.
        let isHidden = isArriving || record.confinement?.isInForce == true
        var commandLine = try confined(record)
        var sockets = directory(of: name)
        // What is there belongs to a QEMU that has ended.
        removeArrivals(of: name)
        if isHidden {
            guard "\(arrivals(of: name))/incoming.sock".utf8.count < 108 else {
                throw GuestError(
                    "The path \(arrivals(of: name)) is too long for a socket in it; use a shorter --state-dir"
                )
            }
            sockets = arrivals(of: name)
            try DurableFile.makeDirectory(sockets)
            commandLine = commandLine.placingSockets { index, _ in "\(sockets)/\(index)" }
        }
        let confinement = try record.confinement?.confinement(
            commandLine,
            run: runDirectory(of: name),
            sockets: sockets
        )
        let agentMonitor = "\(sockets)/qmp.sock"
        var arguments = commandLine.arguments + extra
        if let confinement = record.confinement, confinement.filtersSystemCalls {
            arguments += ["-sandbox", ConfinementPolicy.systemCallFilter]
        }
        // What follows may refer to the secrets.
        if let key { arguments.insert(contentsOf: key.arguments(), at: 1) }
        for (id, path) in [("crossdock-qmp", agentMonitor), ("crossdock-status", "\(sockets)/status.sock")] {
            unlink(path)
            arguments += ["-chardev", "socket,id=\(id),path=\(path),server=on,wait=off"]
            arguments += ["-qmp", "chardev:\(id)"]
        }
        unlink(log(of: name))
        let process: EmulatorProcess
        do {
            try await makeTaps(of: record)
            process = try EmulatorProcess.start(
                arguments,
                directory: record.commandLine.directory,
                log: log(of: name),
                keep: key.map { [$0.descriptor] } ?? [],
                confinement: confinement
            )
        } catch {
            removeTaps(of: record)
            throw error
        }
        record.process = process
        do {
            try save(record)
            let end = ContinuousClock.now + .seconds(30)
            while true {
                if !process.isRunning {
                    let words = EmulatorProcess.tail(of: log(of: name))
                    throw GuestError("QEMU ended at once: \(words.isEmpty ? "it said nothing" : words)")
                }
                if DurableFile.exists(agentMonitor),
                    let monitor = try? await QMPClient.connect(to: agentMonitor, on: loop)
                {
                    if isHidden, !isArriving { try openMonitors(of: record) }
                    let directory = record.commandLine.directory
                    linkOutputs(of: record) { DurableFile.resolve($0, in: directory) }
                    return monitor
                }
                guard ContinuousClock.now < end else { throw GuestError("QEMU's monitor did not answer within 30 s") }
                await loop.sleep(for: .milliseconds(20))
            }
        } catch {
            await process.terminate()
            removeTaps(of: record)
            throw error
        }
    }

    /// The command line of a guest as its QEMU gets it: without what it says about its own confinement, and with its files of
    /// memory in a directory of its own.
    private func confined(_ record: GuestRecord) throws -> GuestCommandLine {
        guard let confinement = record.confinement else { return record.commandLine }
        return try record.commandLine.confined { path in
            guard confinement.isInForce else { return path }
            var status = stat()
            let isDirectory = stat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFDIR
            let parent = isDirectory ? path : path.split(separator: "/").dropLast().reduce("") { "\($0)/\($1)" }
            // QEMU says best what it cannot find.
            guard isDirectory || DurableFile.exists(parent) else { return path }
            let own = "\(parent)/crossdock-\(record.name)"
            try DurableFile.makeDirectory(own)
            return own
        }
    }

    /// The sockets of an arriving guest's monitors, where they are until it belongs to this host.
    public func monitorsOnArrival(of record: GuestRecord) -> [String] {
        let own = record.commandLine.sockets.enumerated().filter(\.element.isMonitor)
            .map { "\(arrivals(of: record.name))/\($0.offset)" }
        return ["\(arrivals(of: record.name))/status.sock"] + own
    }

    /// Puts the sockets of a guest that belongs to this host now in their places. What is there already stays.
    ///
    /// A Unix socket that is bound can be renamed; whoever is connected stays connected.
    public func openMonitors(of record: GuestRecord) throws {
        let hidden = arrivals(of: record.name)
        guard DurableFile.exists(hidden) else { return }
        var moves = [
            ("\(hidden)/qmp.sock", agentMonitor(of: record.name)),
            ("\(hidden)/status.sock", statusMonitor(of: record.name)),
        ]
        for (index, socket) in record.commandLine.sockets.enumerated() {
            moves.append(("\(hidden)/\(index)", DurableFile.resolve(socket.path, in: record.commandLine.directory)))
        }
        for (from, to) in moves where DurableFile.exists(from) {
            guard rename(from, to) == 0 else { throw FileError.system("put the socket \(to) in its place", errno) }
        }
        DurableFile.remove(hidden)
    }

    /// Takes up a QEMU that something else started.
    ///
    /// Nothing of the guest is changed. A monitor that another client holds is no obstacle to this; another monitor of the
    /// same QEMU takes its place if there is one.
    ///
    /// - Parameters:
    ///   - name: what the guest shall be called here.
    ///   - socket: its QMP monitor.
    ///   - loop: the caller's loop.
    /// - Returns: the record, saved, and a monitor when one answers.
    /// - Throws: `GuestError` when there is no QEMU, or the name is taken.
    public func adopt(
        _ name: String,
        monitor socket: String,
        on loop: EventLoop
    ) async throws -> (GuestRecord, QMPClient?) {
        try Self.validate(name)
        let emulator = try await BlockingPool.shared.run { try RunningEmulator.find(monitor: socket) }
        if let known = try load(name), let process = known.process, process.isRunning, process != emulator.process {
            throw GuestError("Guest '\(name)' runs already, as process \(process.pid); choose another name")
        }
        for other in names() where other != name {
            if let process = (try? load(other))??.process, process == emulator.process {
                throw GuestError("The QEMU behind \(socket) is guest '\(other)' already")
            }
        }
        func refuseFrozen() throws {
            guard emulator.process.isFrozen else { return }
            throw GuestError(
                "The QEMU behind \(socket) (process \(emulator.process.pid)) is frozen and answers nobody; 'crossdock status' says "
                    + "whether a migration did that"
            )
        }
        try refuseFrozen()
        var record = GuestRecord(
            name: name,
            commandLine: GuestCommandLine(arguments: emulator.arguments, directory: emulator.directory)
                .withoutClearSecrets,
            process: emulator.process
        )
        record.adopted = socket
        // What was said about the guest is not QEMU's.
        let known = (try? load(name)) ?? nil
        (record.placement, record.origin) = (known?.placement, known?.origin)
        var found: QMPClient?
        var failure: (any Error)?
        for path in [socket] + emulator.monitors where found == nil {
            do {
                found = try await QMPClient.connect(to: path, on: loop, timeout: .seconds(3))
                record.adopted = path
            } catch { failure = failure ?? error }
        }
        if found == nil {
            try refuseFrozen()
            if let failure = failure as? QMPError, failure.code == .malformed { throw GuestError(failure.message) }
        }
        do {
            try save(record)
        } catch {
            found?.close()
            throw error
        }
        linkOutputs(of: record, emulator.resolve)
        return (record, found)
    }

    /// Asks a guest to shut down (ACPI), and ends its QEMU when it has.
    ///
    /// - Parameters:
    ///   - record: the guest, which runs.
    ///   - patience: how long it may take.
    ///   - loop: the caller's loop.
    /// - Returns: false when it has not: it goes on as it was.
    /// - Throws: when its monitor cannot be asked.
    public func shutDown(_ record: GuestRecord, patience: Duration, on loop: EventLoop) async throws -> Bool {
        guard let process = record.process, process.isRunning else { return true }
        let monitor = try await connect(to: record, .status, on: loop)
        defer { monitor.close() }
        try await monitor.execute("system_powerdown")
        let end = ContinuousClock.now + patience
        while process.isRunning {
            // QEMU stays when it was told so (-no-shutdown).
            if (try? await monitor.status()) == RunState.shutdown.rawValue { await monitor.quit() }
            guard ContinuousClock.now < end else { return false }
            try await Task.sleep(for: .milliseconds(200))
        }
        return true
    }

    /// Ends a QEMU that was only there to move a guest that is off.
    ///
    /// - Throws: `FileError` when that cannot be noted.
    public func switchOff(_ record: inout GuestRecord) async throws {
        await record.process?.terminate(grace: .zero)
        removeTaps(of: record)
        removeSockets(of: record.name)
        (record.process, record.isOff) = (nil, nil)
        try save(record)
    }

    /// Ends a guest's QEMU, in the orderly way of its monitor if it answers.
    public func stop(_ record: GuestRecord, on loop: EventLoop) async {
        guard let process = record.process, process.isRunning else { return }
        if let monitor = try? await connect(to: record, .status, on: loop, timeout: .seconds(2)) {
            await monitor.quit()
            monitor.close()
        }
        await process.terminate()
        removeTaps(of: record)
        removeSockets(of: record.name)
    }

    /// Removes the sockets of a QEMU that has ended, which one that is killed leaves.
    private func removeSockets(of guest: String) {
        let own = outputs(of: guest).filter { $0.status.st_mode & S_IFMT == S_IFSOCK }.map(\.path)
        for path in own + [agentMonitor(of: guest), statusMonitor(of: guest)] { unlink(path) }
    }

    /// What a guest does now, for people: QEMU's run state, "stopped", "released", "arriving" while it belongs to another host,
    /// "frozen", or "unknown" when QEMU is silent.
    public func state(of record: GuestRecord, on loop: EventLoop) async -> String {
        guard let process = record.process, process.isRunning else {
            return record.released == nil ? "stopped" : "released"
        }
        if record.isOff == true { return "stopped" }
        if process.isFrozen { return "frozen" }
        if DurableFile.exists(arrivals(of: record.name)) { return "arriving" }
        if let monitor = try? await connect(to: record, .status, on: loop, timeout: .seconds(2)) {
            defer { monitor.close() }
            if let status = try? await monitor.status(timeout: .seconds(2)) { return status }
        }
        return process.isFrozen ? "frozen" : "unknown"
    }
}
