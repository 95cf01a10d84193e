internal import Emulator
internal import Glibc
public import IO
internal import Migration
internal import TLS

/// Carries an evacuation out: it does what `Evacuation` says is due, and tells it what came of that.
///
/// Each guest is moved by a source agent of its own, which goes on when this process dies. Whoever takes the plan up then asks the
/// journals of the migrations what became of them. Confined to its loop.
public final class EvacuationConductor: @unchecked Sendable {
    // Unchecked: confined to the loop.
    private let files: EvacuationFiles
    private let loop: EventLoop
    private let migrations: MigrationStore
    private let say: @Sendable (String) -> Void
    private var evacuation: Evacuation
    private let changed = AsyncCondition()
    private var agents: [String: SourceAgent] = [:]
    private var hosts: [EvacuationOrder.Target: TargetHost] = [:]
    private var latest: [String: EvacuationEvent] = [:]
    private var fault: (any Error)?
    /// The plan as it was written last.
    private var saved: [UInt8] = []

    /// How often who watches gets to see how far it is.
    private static let tick = Duration.milliseconds(500)
    /// How long room is kept for a guest that is about to be offered, in seconds.
    private static let reservation: UInt32 = 120

    /// Makes the conductor of a plan.
    ///
    /// - Parameters:
    ///   - evacuation: the plan; it is written before anything is done.
    ///   - loop: where it lives.
    ///   - say: is told every sentence for people.
    public init(_ evacuation: Evacuation, on loop: EventLoop, say: @escaping @Sendable (String) -> Void) {
        self.evacuation = evacuation
        self.loop = loop
        self.say = say
        files = EvacuationFiles(stateDirectory: evacuation.order.migration.stateDirectory)
        migrations = MigrationStore(stateDirectory: evacuation.order.migration.stateDirectory)
    }

    /// Carries it out, or goes on with it.
    ///
    /// - Returns: the exit code.
    /// - Throws: `FileError` when the plan cannot be written: nothing more is begun then, and migrations under way go on by themselves.
    public func run() async throws -> Int32 {
        try await loop.run {
            try self.save()
            self.tell("begun") { _ in }
            self.takeUp()
            try await self.carryOut()
            return try await self.conclude()
        }
    }

    // MARK: The main loop

    private func carryOut() async throws {
        while !evacuation.isOver || !agents.isEmpty {
            if DurableFile.exists(files.cancellation(of: evacuation.id)) { evacuation.cancel() }
            let steps = evacuation.due(at: time(nil))
            try save()
            for step in steps { try perform(step) }
            writeProgress()
            if evacuation.isOver, agents.isEmpty { return }
            let timer = loop.schedule(after: Self.tick) { self.changed.signal() }
            await changed.wait()
            timer.cancel()
            if let fault { throw fault }
        }
    }

    private func perform(_ step: Evacuation.Step) throws {
        switch step {
        case .giveUp(let guest, let migration):
            note(guest, "giving up") { $0.migration = migration }
            if let agent = agents[guest] {
                agent.cancel()
            } else {
                // One that an earlier coordinator has started.
                migrations.files(of: migration).running(.agent)?.signal(SIGINT)
            }
        case .begin(let guest, let target):
            let id = MigrationStore.makeID()
            evacuation.begun(guest, migration: id, target: target)
            try save()
            Task(executorPreference: loop) { await self.move(guest, to: target, migration: id) }
        }
    }

    /// Writes the plan, if it is another one than is on the disk.
    private func save() throws {
        let bytes = try evacuation.encoded()
        guard bytes != saved else { return }
        try files.save(evacuation)
        saved = bytes
    }

    /// The plan is written before anything else follows from it.
    private func change(_ body: (inout Evacuation) -> Void) {
        body(&evacuation)
        do { try save() } catch { fault = fault ?? error }
        changed.signal()
    }

    // MARK: One guest

    private func move(_ guest: String, to target: EvacuationOrder.Target, migration id: String) async {
        note(guest, "copying") { ($0.migration, $0.target) = (id, "\(target)") }
        do {
            let room: String?
            switch try await reserve(guest, on: target) {
            case .denied(let reason)?:
                note(guest, "waiting") { ($0.target, $0.message) = ("\(target)", reason) }
                return change { $0.refused(guest, by: target, reason: reason) }
            case .granted(let reserved)?: room = reserved.id
            case nil: room = nil
            }
            try await stop(guest)
            let share = evacuation.order.migration.bandwidth / UInt64(max(evacuation.order.parallelCopies, 1))
            let order = evacuation.order.agent(guest, to: target, migration: id) {
                $0.reservation = room
                $0.evacuation = evacuation.id
                $0.copyPlaces = evacuation.order.parallelCopies
                $0.bandwidth = share
            }
            let agent = try SourceAgent.start(order)
            agents[guest] = agent
            var report: MigrationReport?
            for try await event in agent.events {
                follow(event, guest)
                report = event.report ?? report
            }
            agents[guest] = nil
            if let report { end(guest, outcome(of: report), report) } else { try await learn(guest, id) }
        } catch {
            agents[guest] = nil
            // What became of it is in its journal, if it got so far.
            if DurableFile.exists(migrations.journal(of: id)) {
                say("\(error)")
                await recover(guest, id)
            } else {
                let code = (error as? MigrationError)?.code ?? .failed
                end(guest, .failed(code: code, reason: "\(error)"), nil)
            }
        }
    }

    /// Shuts a guest down that its operator has permitted that for. One that does not shut down goes on, and stays.
    private func stop(_ guest: String) async throws {
        guard evacuation.guests.contains(where: { $0.name == guest && $0.stops }) else { return }
        let store = GuestStore(stateDirectory: migrations.stateDirectory)
        guard let lock = try migrations.lock(guest: guest) else {
            throw MigrationError(.busy, "Guest '\(guest)' is being migrated already; see 'crossdock status'")
        }
        defer { withExtendedLifetime(lock) {} }
        guard let record = try store.load(guest) else { return }
        note(guest, "stopping") { _ in }
        let patience = Duration.seconds(evacuation.order.stopPatience)
        guard try await store.shutDown(record, patience: patience, on: loop) else {
            throw MigrationError(
                .guest,
                "it was asked to shut down and has not within \(evacuation.order.stopPatience) s; it goes on running here"
            )
        }
    }

    private func reserve(_ guest: String, on target: EvacuationOrder.Target) async throws -> TargetHost.Admission? {
        guard let entry = evacuation.guests.first(where: { $0.name == guest }) else { return nil }
        let usage = GuestUsage(
            memory: entry.memory,
            processors: entry.processors,
            disk: max(entry.diskAtMost, entry.disk)
        )
        return try await host(target).reserve(
            .init(guest: guest, usage: usage, allocated: entry.disk, seconds: Self.reservation)
        )
    }

    private func host(_ target: EvacuationOrder.Target) throws -> TargetHost {
        if let known = hosts[target] { return known }
        let credentials = try evacuation.order.agent("", to: target, migration: evacuation.id) { _ in }.credentials()
        let host = TargetHost(
            target,
            evacuation: evacuation.id,
            credentials: credentials,
            on: loop
        )
        hosts[target] = host
        return host
    }

    private func follow(_ event: MigrationEvent, _ guest: String) {
        switch event.event {
        case "phase":
            let phase = event.phase.map(Evacuation.Phase.init(of:)) ?? .switching
            if evacuation.entered(guest, phase) { changed.signal() }
            latest[guest]?.phase = event.phase
            latest[guest]?.measure(nil)
            if phase == .switching, latest[guest]?.state != "switching" { note(guest, "switching") { _ in } }
        case "progress":
            latest[guest]?.measure(event)
            if event.phase == "disks", let remaining = event.remaining, remaining <= Evacuation.headStart,
                evacuation.entered(guest, .ending)
            {
                changed.signal()
            }
        case "warning":
            var warning = self.event("warning")
            (warning.guest, warning.message) = (guest, event.message)
            write(warning)
        default: break
        }
    }

    private func outcome(of report: MigrationReport) -> Evacuation.Outcome {
        switch report.outcome {
        case .migrated, .overruled: .migrated(blackoutMS: report.blackoutMS)
        case .undecided: .undecided
        case .rolledBack, .rehearsed:
            .failed(
                code: MigrationError.Code(rawValue: report.code) ?? .failed,
                reason: report.reason ?? "the migration was rolled back"
            )
        }
    }

    private func end(_ guest: String, _ outcome: Evacuation.Outcome, _ report: MigrationReport?) {
        change { $0.ended(guest, outcome, at: time(nil)) }
        guard let entry = evacuation.guests.first(where: { $0.name == guest }) else { return }
        switch entry.standing {
        case .moved(let migration, let target):
            note(guest, "moved") {
                ($0.migration, $0.target, $0.blackoutMS) = (migration, "\(target)", entry.blackoutMS)
                if report?.isOff == true { $0.message = "it is off there" }
            }
        case .undecided(let migration, let target):
            note(guest, "undecided") {
                ($0.migration, $0.target) = (migration, "\(target)")
                $0.message =
                    "it was released to \(target), which has not confirmed that it has it; 'crossdock recover \(migration)' asks it"
            }
        case .stays(let reason): note(guest, "stays") { $0.message = reason }
        case .waiting(let until, let reason):
            note(guest, "waiting") { $0.message = "\(reason); it is tried again in \(max(until - time(nil), 0)) s" }
        case .planned, .moving: note(guest, "planned") { $0.message = report?.reason }
        }
    }

    // MARK: Going on

    /// Finds out what became of the migrations that an earlier coordinator has begun.
    private func takeUp() {
        for guest in evacuation.guests {
            guard case .moving(let id, let target) = guest.standing else { continue }
            evacuation.found(guest.name, .copying)
            note(guest.name, "copying") { ($0.migration, $0.target) = (id, "\(target)") }
            Task(executorPreference: loop) { await self.recover(guest.name, id) }
        }
    }

    /// Waits until nobody works on a migration any more, ends what was left in the middle, and tells the plan.
    private func recover(_ guest: String, _ id: String) async {
        let work = migrations.files(of: id)
        while [.agent, .watchdog, .recovery].contains(where: { work.running($0) != nil }) {
            await loop.sleep(for: .milliseconds(200))
        }
        do { try await learn(guest, id) } catch {
            say("\(error)")
            end(guest, .undecided, nil)
        }
    }

    /// What the journal of a migration says that nobody works on.
    private func learn(_ guest: String, _ id: String) async throws {
        guard let reading = try migrations.reading(of: id) else { return end(guest, .notBegun, nil) }
        let report = (try? DurableFile.read(migrations.files(of: id).report)).flatMap { $0 }
            .flatMap { try? MigrationReport(parsing: $0) }
        switch reading.standing {
        case .source(.confirmed), .source(.overruled):
            end(guest, .migrated(blackoutMS: report?.blackoutMS), report)
        case .source(.rolledBack(let reason)):
            let code = report.flatMap { MigrationError.Code(rawValue: $0.code) } ?? .failed
            end(guest, .failed(code: code, reason: report?.reason ?? reason), report)
        case .source(.open), .source(.reclaimed), .source(.taken), .source(.released):
            let report = try await Recovery(stateDirectory: migrations.stateDirectory, say: say).recover(id)
            var outcome = outcome(of: report)
            if case .failed(_, let reason) = outcome, report.code == 0 {
                outcome = .failed(code: .failed, reason: reason)
            }
            end(guest, outcome, report)
        case .destination: end(guest, .notBegun, nil)
        }
    }

    // MARK: The end

    private func conclude() async throws -> Int32 {
        for host in hosts.values { host.close() }
        var code = evacuation.code
        // Not what was planned counts, but who is here.
        let state = migrations.stateDirectory
        let knownOnly = evacuation.order.knownOnly
        let inventory = try await BlockingPool.shared.run {
            try Inventory(stateDirectory: state, knownOnly: knownOnly)
        }
        let left = inventory.left(ignoring: evacuation.ignored)
        if code == 0, !left.isEmpty { code = 20 }
        try save()
        writeProgress()
        let report = EvacuationReport(evacuation, code: code, left: left, ended: time(nil))
        try DurableFile.write(Array(report.json.utf8), to: files.report(of: evacuation.id))
        tell("finished") {
            $0.code = code
            $0.message = report.sentence
        }
        return code
    }

    // MARK: What is told

    private func event(_ name: String) -> EvacuationEvent {
        EvacuationEvent(name, evacuation: evacuation.id, time: time(nil))
    }

    private func tell(_ name: String, _ body: (inout EvacuationEvent) -> Void) {
        var event = event(name)
        body(&event)
        write(event)
    }

    private func note(_ guest: String, _ state: String, _ body: (inout EvacuationEvent) -> Void) {
        var event = event("guest")
        (event.guest, event.state) = (guest, state)
        (event.target, event.migration) = (latest[guest]?.target, latest[guest]?.migration)
        body(&event)
        latest[guest] = event
        write(event)
    }

    private func write(_ event: EvacuationEvent) {
        let path = files.events(of: evacuation.id)
        let file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
        guard file >= 0 else { return }
        defer { close(file) }
        try? DurableFile.append(Array(event.line.utf8), to: file, path: path)
    }

    /// For who watches. A crash may take it: what counts is in the plan.
    private func writeProgress() {
        let progress = EvacuationProgress(evacuation, latest)
        guard let bytes = try? JSONText.encode(progress) else { return }
        let path = files.progress(of: evacuation.id)
        let file = open("\(path).new", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o600)
        guard file >= 0 else { return }
        let isWritten = (try? DurableFile.append(Array(bytes), to: file, path: path)) != nil
        close(file)
        if isWritten { rename("\(path).new", path) }
    }
}
