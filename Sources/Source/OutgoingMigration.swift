internal import CLinux
internal import Emulator
internal import FoundationEssentials
internal import Glibc
public import IO
public import Migration
internal import NBD
public import TLS

/// One migration, seen from the source: the sequence, the ownership and the way back.
///
/// Confined to its control loop. Until RELEASED is durable every failure ends with the guest running here and nothing
/// left behind; from then on the guest belongs to the destination and only OWNED ends the migration.
public final class OutgoingMigration: @unchecked Sendable {
    // Unchecked: confined to the control loop.
    static let patienceWithThrottle = 12

    let plan: MigrationPlan
    let credentials: any TLSCredentials
    let loop: EventLoop
    let dataLoops: EventLoopGroup
    let guests: GuestStore
    let migrations: MigrationStore
    let emit: @Sendable (MigrationEvent) -> Void
    private let began = ContinuousClock.now
    private var phaseBegan = ContinuousClock.now
    private var phase = ""
    var report: MigrationReport
    /// The highest speed at which the disks were copied, in bytes per second.
    var diskRate = 0.0

    /// What ended the migration from outside the main flow.
    private(set) var fault: MigrationError?
    /// Why the memory has to be sent again.
    var memoryFault: MemoryLost?
    private let changed = AsyncCondition()
    var record: GuestRecord?
    var monitor: QMPClient?
    var control: ControlConnection?
    var journal: Journal?
    var disks: [SourceDisk] = []
    var stream: OutgoingStream?
    var shadow: ShadowEmulator?
    /// What a blank copy said last before it ended.
    var shadowWords: String?
    /// The containers whose headers are sent as files, by the name of the file.
    var headers: [String: String] = [:]
    /// The disks of which only what is above the backing image is copied.
    var keepsBacking: Set<String> = []
    var stoppedAt: ContinuousClock.Instant?
    var isAtSwitchover = false
    var hasMigrationStarted = false
    var isReleased = false
    var mayBePrepared = false
    /// Whether RELEASED could be written, but perhaps not durably: nobody may run the guest before the destination has given up.
    var isInDoubt = false
    /// Whether every disk is still mirrored, so that the memory can be sent again.
    var areMirrorsWhole = true
    /// Whether QEMU may pause the guest at any moment.
    var isSendingMemory = false
    /// How often the memory was sent in vain.
    var memoryAttempts = 0
    /// When the present attempt began.
    var attemptBegan: ContinuousClock.Instant?
    /// How many reconnections there had been when the disks were verified.
    var verifiedReconnects = 0
    /// When it did not get through for the first time.
    var memoryTrouble: ContinuousClock.Instant?
    static let memoryAttemptsLimit = 20
    /// Whether the destination may have said READY: it then waits for a source that it has lost.
    var isAwaited = false
    /// Whether a lost connection to the destination is made again.
    var isResumable = false
    var watchdog: SwitchoverWatchdog?
    /// The guest's secrets; wiped with the migration.
    var secrets: [String: SecretBytes] = [:]
    /// The digests of the images, read in full while the guest is paused.
    var fullDigests: [String: String] = [:]
    private(set) var isReconnecting = false
    var enabledCapabilities: [String] = []
    var earlierParameters: [String: JSONValue] = [:]
    var deadline: LoopTimer?
    var isRolledBack = false
    /// Who has taken the guest for this host although it was released; the destination is told instead of asked.
    var overruler: String?
    /// Who has taken the guest for the destination without this host's word.
    var overruledBy: String?
    static let superseded = "Its source agent ended; a later migration followed"
    var guestLock: FileLock?

    /// Makes a migration.
    ///
    /// - Parameters:
    ///   - plan: what to do.
    ///   - credentials: a client's.
    ///   - loop: the control loop.
    ///   - dataLoops: where disks and memory are carried.
    ///   - emit: gets every event, on the control loop.
    public init(
        plan: MigrationPlan,
        credentials: any TLSCredentials,
        loop: EventLoop,
        dataLoops: EventLoopGroup,
        emit: @escaping @Sendable (MigrationEvent) -> Void
    ) {
        self.plan = plan
        self.credentials = credentials
        self.loop = loop
        self.dataLoops = dataLoops
        self.emit = emit
        guests = GuestStore(stateDirectory: plan.stateDirectory)
        migrations = MigrationStore(stateDirectory: plan.stateDirectory)
        report = MigrationReport(migration: plan.id, guest: plan.guest, destination: "\(plan.address)")
    }

    // MARK: From outside

    /// Asks for a roll-back. Without effect once the guest was released. From any thread.
    public func cancel() {
        loop.execute { self.fail(MigrationError(.cancelled, "The migration was cancelled")) }
    }

    /// Notes the first reason to stop, and wakes the main flow.
    func fail(_ error: MigrationError) {
        if fault == nil, !isReleased {
            fault = error
            control?.interruption = error
        }
        changed.signal()
    }

    /// Waits for an event or for the time to pass.
    ///
    /// - Throws: the reason to stop, if there is one, or `MemoryLost`.
    func wait(_ time: Duration) async throws {
        try checkMemory()
        let timer = loop.schedule(after: time) { self.changed.signal() }
        defer { timer.cancel() }
        await changed.wait()
        try checkMemory()
    }

    func wake() { changed.signal() }

    func checkMemory() throws {
        if let fault { throw fault }
        if let memoryFault { throw memoryFault }
    }

    // MARK: The connection to the destination

    func watch(_ control: ControlConnection) {
        control.onFailure = { [weak self, unowned control] error in
            guard let self else { return }
            guard self.isResumable, control.isLost, !self.isReleased, self.fault == nil else { return self.fail(error) }
            self.reconnect(error)
        }
    }

    /// The link may come back, and the destination's agent: the guest runs on meanwhile.
    private func reconnect(_ error: MigrationError) {
        guard !isReconnecting else { return }
        isReconnecting = true
        warn("\(error.message). The guest runs on here; trying again for \(plan.patience) s")
        Task(executorPreference: loop) {
            defer {
                self.isReconnecting = false
                self.changed.signal()
            }
            let end = ContinuousClock.now + .seconds(self.plan.patience)
            var last = error
            var pause = Duration.milliseconds(100)
            while self.fault == nil, !self.isReleased {
                do {
                    return try await self.connectAgain()
                } catch let error as MigrationError {
                    last = error
                    // A handshake that was damaged on the way looks like one that was refused, but does not stay.
                    // An agent that has just been started may refuse for a moment.
                    if ![.unreachable, .security, .refused].contains(error.code) { return self.fail(error) }
                } catch { last = MigrationError(.failed, "\(error)") }
                guard ContinuousClock.now < end else {
                    return self.fail(
                        MigrationError(
                            .failed,
                            "\(self.plan.host) was lost and could not be reached again within \(self.plan.patience) s: \(last.message)"
                        )
                    )
                }
                await self.loop.sleep(for: pause)
                pause = min(pause * 2, .seconds(1))
            }
        }
    }

    private func connectAgain() async throws {
        let (next, welcome) = try await ControlConnection.open(plan, credentials: credentials, on: loop)
        guard fault == nil, !isReleased else { return next.close() }
        if let by = welcome.takenBy {
            next.close()
            await learnOverruling(by: by)
            throw MigrationError(.failed, report.reason ?? "The guest belongs to \(plan.host) now")
        }
        guard welcome.state == .offered || welcome.state == .prepared else {
            next.close()
            throw MigrationError(.failed, "The destination has given the migration up meanwhile")
        }
        do { try await sendSecrets(next) } catch {
            next.close()
            throw MigrationError(.unreachable, "\(error)")
        }
        report.reconnects += 1
        control = next
        watch(next)
        // It may have been lost before anybody watched it.
        if let failure = next.failure { throw MigrationError(.unreachable, failure.message) }
        for disk in disks { disk.relay?.move(to: plan.address.with(port: welcome.nbdPort)) }
        warn("Connected to \(plan.host) again")
    }

    /// The connection, once there is one.
    func connectedControl() async throws -> ControlConnection {
        while true {
            try checkMemory()
            if let control, control.failure == nil { return control }
            guard isReconnecting else { throw control?.failure ?? MigrationError(.failed, "There is no connection") }
            await changed.wait()
        }
    }

    /// Sends a message and waits for its answer, again when the connection is lost meanwhile: each may be said twice.
    func ask(_ message: Message, timeout: Duration) async throws -> Message {
        while true {
            let control = try await connectedControl()
            do {
                return try await control.ask(message, timeout: timeout)
            } catch let error as MigrationError {
                if let fault { throw fault }
                guard control.isLost, isResumable else { throw error }
            }
        }
    }

    // MARK: Events

    private func milliseconds(since start: ContinuousClock.Instant) -> Double {
        let parts = (ContinuousClock.now - start).components
        return Double(parts.seconds) * 1000 + Double(parts.attoseconds / 1_000_000_000_000) / 1000
    }

    private func event(_ name: String) -> MigrationEvent {
        MigrationEvent(name, migration: plan.id, guest: plan.guest, ms: milliseconds(since: began))
    }

    func enter(_ name: String) {
        if !phase.isEmpty { report.phasesMS[phase] = milliseconds(since: phaseBegan) }
        phase = name
        phaseBegan = .now
        var event = event("phase")
        event.phase = name
        emit(event)
    }

    func progress(percent: Double, rate: Double, remaining: Double?) {
        var event = event("progress")
        event.phase = phase
        event.percent = min(max(percent, 0), 100)
        event.rate = rate
        event.remaining = remaining
        emit(event)
    }

    func warn(_ message: String) {
        var event = event("warning")
        event.message = message
        emit(event)
    }

    // MARK: The main flow

    /// Migrates the guest, or leaves everything as it was.
    ///
    /// - Returns: the report; its `code` is the exit code.
    public func start() async throws -> MigrationReport { try await loop.run { await self.run() } }

    private func run() async -> MigrationReport {
        await carryOut()
        return await conclude()
    }

    private func carryOut() async {
        do {
            enter("check")
            try await prepareSource()
            try await offerGuest()
            if plan.isRehearsal { return await endRehearsal() }
            enter("disks")
            try await mirrorDisks()
            enter("verify")
            try await verifyDisks()
            try await moveMemory()
            if let refusal = await handOver() { return await takeBack(refusal) }
            enter("done")
            await finish()
        } catch {
            await rollBack(error)
        }
    }

    /// The rehearsal went well: the destination forgets it, and nothing was changed here.
    private func endRehearsal() async {
        report.outcome = .rehearsed
        try? await control?.send(.abort("The rehearsal is over"))
        while let answer = try? await control?.next(timeout: .seconds(5)) {
            if case .abort = answer { break }
        }
    }

    private func conclude() async -> MigrationReport {
        report.phasesMS[phase] = milliseconds(since: phaseBegan)
        report.phasesMS["done"] = nil
        for index in disks.indices {
            guard let relay = disks[index].relay, index < report.disks.count else { continue }
            report.disks[index].bytesSent = relay.counters.bytesSent
            report.disks[index].zeroBytes = relay.counters.zeroBytes
            report.reconnects += relay.counters.reconnects
            report.bytesResent += relay.counters.bytesResent
        }
        report.ramBytesSent = stream?.bytesSent ?? 0
        report.totalMS = milliseconds(since: began)
        if let control {
            let count = 1 + (stream?.connections ?? 0) + disks.reduce(0) { $0 + ($1.relay?.connections ?? 0) }
            report.tls = .init(version: control.session.version, cipher: control.session.cipher, connections: count)
        }
        stream?.abort("The migration is over")
        await shadow?.stop()
        removeSockets()
        control?.close()
        watchdog?.dismiss()
        monitor?.close()
        secrets = [:]
        guestLock = nil
        if let text = try? MigrationReportFile.save(report, migrations) { warn(text) }
        var event = event("finished")
        event.report = report
        emit(event)
        return report
    }

    // MARK: check

    private func prepareSource() async throws {
        do {
            try GuestStore.validate(plan.guest)
            guard let lock = try migrations.lock(guest: plan.guest) else {
                throw MigrationError(.busy, "Guest '\(plan.guest)' is being migrated already; see 'crossdock status'")
            }
            guestLock = lock
            if let bar = try migrations.startBar(of: plan.guest) {
                throw MigrationError(.guest, bar.sentence(guest: plan.guest))
            }
            let monitor = try await connectToGuest()
            self.monitor = monitor
            monitor.onEvent = { [weak self] in self?.handle($0) }
            monitor.onDisconnect = { [weak self] in
                self?.fail(
                    MigrationError(.failed, "QEMU of guest '\(self?.plan.guest ?? "")' ended or closed its monitor")
                )
            }
            let status = try await monitor.status()
            guard status == "running" else {
                let earlier = superseded().last.map {
                    "; 'crossdock recover \($0)' ends what an earlier migration left"
                }
                throw MigrationError(
                    .guest,
                    "Guest '\(plan.guest)' is in the state '\(status)', not running\(earlier ?? "")"
                )
            }
            if !plan.isRehearsal {
                // What an operator has taken, the other host has yet to learn.
                for id in superseded() where try migrations.reading(of: id)?.isTaken == false {
                    try Journal(opening: migrations.journal(of: id)).append(.rolledBack(reason: Self.superseded))
                }
            }
            try await clearExports(monitor)
            if !plan.isRehearsal { try await clearLeftovers(monitor) }
        } catch let error as GuestError {
            throw MigrationError(.guest, error.message)
        } catch let error as QMPError {
            throw MigrationError(.guest, "The monitor of guest '\(plan.guest)': \(error.message)")
        }
    }

    /// The monitor of a guest that is known here, or of a running QEMU that is adopted for this migration.
    private func connectToGuest() async throws -> QMPClient {
        if let socket = plan.monitor {
            let (adopted, monitor) = try await guests.adopt(plan.guest, monitor: socket, on: loop)
            record = adopted
            guard let monitor else {
                throw MigrationError(
                    .guest,
                    "The monitor \(socket) of guest '\(plan.guest)' is held by another client; end that, or give QEMU a second one"
                )
            }
            return monitor
        }
        guard let found = try guests.load(plan.guest) else {
            let known = guests.names().joined(separator: ", ")
            throw MigrationError(
                .guest,
                "There is no guest '\(plan.guest)' on this host"
                    + (known.isEmpty
                        ? "; start one with 'crossdock guest start', or name the monitor of a running QEMU with --qmp"
                        : "; there are: \(known)")
            )
        }
        record = found
        guard let process = found.process, process.isRunning else {
            throw MigrationError(.guest, "Guest '\(plan.guest)' does not run, so it cannot be migrated live")
        }
        do {
            return try await QMPClient.connect(to: guests.agentMonitor(of: found), on: loop)
        } catch let error as ChannelError {
            throw MigrationError(.guest, "The monitor of guest '\(plan.guest)' cannot be reached: \(error.message)")
        }
    }

    /// Earlier migrations of this guest whose agents died before the release.
    private func superseded() -> [String] {
        migrations.ids().filter { id in
            guard let reading = try? migrations.reading(of: id), reading.guest == plan.guest,
                case .source(let standing) = reading.standing
            else { return false }
            return standing.mayRunHere && !standing.isOver
        }
    }

    /// Removes what an export that was killed has left in QEMU.
    private func clearExports(_ monitor: QMPClient) async throws {
        guard try FileLock(guests.exportLock(of: plan.guest)) != nil else {
            throw MigrationError(
                .busy,
                "The disks of guest '\(plan.guest)' are exported by 'crossdock export'; its readers would be left behind. End that first"
            )
        }
        if !plan.isRehearsal, let record { try await GuestExport.clear(record, guests, monitor) }
    }

    /// Removes what a source agent that was killed has left in QEMU: the lock is ours, so nobody uses it.
    func clearLeftovers(_ monitor: QMPClient) async throws {
        for job in try await monitor.execute("query-jobs").array {
            guard let name = job["id"]?.string, name.hasPrefix("xd-disk") else { continue }
            _ = try? await monitor.cancelMirror(name, force: true)
            for _ in 0..<500 {
                guard let left = try await monitor.job(name) else { break }
                if left.status == "concluded" {
                    try await monitor.dismiss(name)
                    break
                }
                await loop.sleep(for: .milliseconds(10))
            }
        }
        for node in try await monitor.execute("query-named-block-nodes", ["flat": true]).array {
            guard let name = node["node-name"]?.string, name.hasPrefix("xdt-disk") else { continue }
            try await monitor.removeNode(name)
        }
    }

    private func handle(_ event: QMPEvent) {
        switch event.name {
        case "STOP": stopped(at: event.received)
        case "MIGRATION":
            switch event.data["status"]?.string {
            case "pre-switchover": isAtSwitchover = true
            case "failed": if stream != nil { memoryFailed("QEMU reports that the migration failed") }
            default: break
            }
        case "BLOCK_JOB_READY":
            let name = event.data["device"]?.string
            if let index = disks.firstIndex(where: { $0.jobName(plan.id) == name }) { disks[index].isReady = true }
        case "BLOCK_JOB_ERROR", "BLOCK_JOB_COMPLETED":
            let name = event.data["device"]?.string
            if let index = disks.firstIndex(where: { $0.jobName(plan.id) == name }) {
                let error = event.data["error"]?.string ?? (event.name == "BLOCK_JOB_ERROR" ? "I/O error" : nil)
                if let error { mirrorFailed(disks[index], error) }
            }
        case "SHUTDOWN": fail(MigrationError(.failed, "The guest shut down while it was migrated"))
        default: break
        }
        changed.signal()
    }

    /// QEMU knows only that its write failed; the relay knows why.
    private func mirrorFailed(_ disk: SourceDisk, _ error: String) {
        Task(executorPreference: loop) {
            let reason = await disk.relay?.failure() ?? error
            self.fail(MigrationError(.failed, "Copying \(disk.offer.name) (\(disk.path)) failed: \(reason)"))
        }
    }

    /// The guest is paused: from here on the blackout has a bound, whatever QEMU or the network wait for.
    private func stopped(at instant: ContinuousClock.Instant) {
        guard hasMigrationStarted, stoppedAt == nil else { return }
        stoppedAt = instant
        deadline = loop.schedule(after: .milliseconds(plan.blackoutDeadline)) {
            guard !self.isReleased else { return }
            let reason = "The guest was paused for \(self.plan.blackoutDeadline) ms, the blackout deadline"
            self.fail(MigrationError(.failed, reason))
            // QEMU may wait for the mirror or the stream; both end now, so that it answers again.
            for disk in self.disks { disk.relay?.abort(reason) }
            self.stream?.abort(reason)
            guard let monitor = self.monitor else { return }
            let nodes = self.disks.filter(\.hasTarget).map { $0.targetNode(self.plan.id) }
            Task(executorPreference: self.loop) {
                async let yanked: Void? = try? monitor.yank(nodes: nodes, migration: true)
                // At pre-switchover QEMU does not notice that its stream is closed.
                async let cancelled: Void? = try? monitor.cancelMigration()
                _ = await (yanked, cancelled)
            }
        }
        watchdog?.guestStopped(at: instant)
    }

    /// Starts the process that looks after the guest when this one cannot.
    func startWatchdog(_ monitor: QMPClient) throws {
        if let watchdog {
            if watchdog.isAlive { return }
            watchdog.dismiss()
            warn("The watchdog of this migration has ended; starting another one")
        }
        watchdog = try SwitchoverWatchdog(plan, monitor: monitor.descriptor, beating: loop)
    }

    // MARK: release

    /// The decision. When this returns nil the guest belongs to the destination and runs there; otherwise the destination
    /// will never run it, and this is why.
    func handOver() async -> String? {
        deadline?.cancel()
        control?.interruption = nil
        // A release that is recovered may have been written before its images were fenced.
        fence()
        enter("release")
        var delay = Duration.milliseconds(100)
        while true {
            do {
                if control == nil || control?.failure != nil {
                    report.reconnects += 1
                    control = try await ControlConnection.open(plan, credentials: credentials, on: loop).0
                }
                guard let control else { continue }
                // A full comparison reads all that the destination has.
                let patience = 30 + (fullDigests.isEmpty ? 0 : Int(disks.reduce(0) { $0 + $1.offer.size } >> 26))
                let answer = try await control.ask(.release(.init(digests: fullDigests)), timeout: .seconds(patience))
                if case .refused(let reason) = answer { return reason }
                guard case .owned(let owned) = answer else {
                    throw MigrationError(.undecided, "it answered RELEASE with \(answer.name)")
                }
                if let stoppedAt {
                    report.blackoutMS = max(0, milliseconds(since: stoppedAt) - max(0, owned.sinceResumed ?? 0))
                }
                report.outcome = .migrated
                for index in disks.indices {
                    report.disks[index].digestDestination = owned.digests[disks[index].offer.name]
                }
                do { try journal?.append(.confirmed) } catch { warn("\(error)") }
                return nil
            } catch {
                warn(waitingSentence(error))
                control?.close()
                await loop.sleep(for: delay)
                delay = min(delay * 2, .seconds(10))
            }
        }
    }

    /// Puts the old images out of reach of whatever might start the guest again.
    func fence() {
        for disk in disks {
            let target = Fence.path(disk.path, plan.id)
            var status = stat()
            guard stat(disk.path, &status) == 0, status.st_mode & S_IFMT == S_IFREG else { continue }
            if rename(disk.path, target) != 0 {
                warn("Cannot rename \(disk.path), which must not be used any more: \(String(cString: strerror(errno)))")
            }
            try? DurableFile.syncDirectory(of: disk.path)
        }
    }

    /// Gives the old images their names back. QEMU opens them by their names again when it resumes the guest.
    func unfence() { for problem in Fence.lift(disks.map(\.path), plan.id) { warn(problem) } }

    /// The destination will never run the guest: it belongs to this side again, once that is durable.
    func takeBack(_ reason: String) async {
        await decide(.reclaimed(reason: reason))
        isReleased = false
        unfence()
        thawEmulator()
        await rollBack(MigrationError(.failed, "The destination refused the guest at the end: \(reason)"))
    }

    /// Writes a record without which nothing can be done; a disk that is full may be emptied.
    func decide(_ record: JournalRecord) async {
        while true {
            do {
                try journal?.append(record)
                return
            } catch {
                warn("Guest '\(plan.guest)' stays paused until this can be written: \(error)")
                await loop.sleep(for: .seconds(1))
            }
        }
    }

    /// Notes for people and for the deletion of the old images; the journal has decided already, so that this need not
    /// happen while the guest is paused.
    func rememberRelease() {
        if var record {
            record.released = .init(migration: plan.id, destination: plan.host)
            try? guests.save(record)
            self.record = record
        }
        try? FencedImages.remember(
            disks.map { Fence.path($0.path, plan.id) },
            migration: plan.id,
            keep: plan.keepSource,
            migrations
        )
    }

    /// Ends the QEMU that has nothing to run any more.
    func endEmulator() async {
        monitor?.onDisconnect = nil
        await monitor?.quit()
        await record?.process?.terminate()
        if let record, record.adopted == nil {
            for name in ["qmp.sock", "status.sock"] { unlink("\(guests.directory(of: record.name))/\(name)") }
        }
    }

    func removeSockets() {
        for socket in migrations.files(of: plan.id).sockets { unlink(socket) }
    }

    /// Ends the old QEMU and compares the images.
    func finish() async {
        rememberRelease()
        _ = try? await control?.ask(.done, timeout: .seconds(10))
        await endEmulator()
        for index in disks.indices {
            let fenced = Fence.path(disks[index].path, plan.id)
            let path = DurableFile.exists(fenced) ? fenced : disks[index].path
            let digest = await digest(of: disks[index], at: path)
            report.disks[index].digestSource = digest
            if disks[index].isSealed {
                warn(
                    "The digests of \(disks[index].offer.name) could not be compared: its secret is not known any more"
                )
            } else if digest == nil || digest != report.disks[index].digestDestination {
                report.code = MigrationError.Code.mismatch.rawValue
                let what =
                    digest == nil || report.disks[index].digestDestination == nil
                    ? "could not be compared" : "differ: the guest has another disk there than it had here"
                report.reason =
                    "The digests of \(disks[index].offer.name) \(what). The guest runs on \(plan.host); the old image is "
                    + "kept as \(path)"
                FencedImages.keepForever(plan.id, migrations)
            }
            await disks[index].relay?.close()
        }
    }

    // MARK: roll-back

    func rollBack(_ error: any Error) async {
        let reason =
            fault ?? (error as? MigrationError)
            ?? MigrationError((error as? CredentialError) != nil ? .security : .failed, "\(error)")
        fault = reason
        deadline?.cancel()
        isResumable = false
        control?.interruption = nil
        // Neither QEMU nor the images are this host's to touch any more.
        if overruledBy != nil { return }
        report.outcome = .rolledBack
        report.reason = reason.message
        report.code = reason.code.rawValue
        stream?.abort(reason.message)
        for disk in disks { disk.relay?.abort(reason.message) }
        while isInDoubt {
            if overruledBy != nil { return }
            warn(
                "Whether guest '\(plan.guest)' was released could not be made durable. It stays paused until \(plan.host) "
                    + "has given it up"
            )
            if await tellDestination(reason.message) { isInDoubt = false } else { await loop.sleep(for: .seconds(1)) }
        }
        unfence()
        var isRestored = true
        if record?.process?.isRunning == true, hasMigrationStarted || disks.contains(where: \.hasTarget) {
            if monitor?.isConnected != true {
                if let record { monitor = try? await QMPClient.connect(to: guests.agentMonitor(of: record), on: loop) }
            }
            if let monitor, monitor.isConnected { isRestored = await restoreGuest(monitor) } else { isRestored = false }
            // A QEMU that has ended meanwhile has nothing left to restore; the guest can be started again. Its monitor is gone a
            // moment before it is.
            for _ in 0..<100 where !isRestored && monitor?.isConnected != true && record?.process?.isRunning == true {
                await loop.sleep(for: .milliseconds(20))
            }
            if record?.process?.isRunning == false { isRestored = true }
            // The rest may take as long as the destination is away.
            if isRestored { watchdog?.guestRuns() }
        }
        let isTold = await tellDestination(reason.message)
        for disk in disks { await disk.relay?.close() }
        if !isRestored {
            warn(
                "Guest '\(plan.guest)' may still be paused; run 'crossdock recover \(plan.id)' once its monitor answers"
            )
        }
        // A migration that is not closed can be recovered: the journal says so until everything is as it was.
        guard isRestored, isTold, !plan.isRehearsal else { return }
        do {
            try journal?.append(.rolledBack(reason: reason.message))
            isRolledBack = true
        } catch { warn("\(error)") }
    }

    /// Brings QEMU back to where it was: no migration, no jobs, no extra nodes, the guest running.
    private func restoreGuest(_ monitor: QMPClient) async -> Bool {
        if hasMigrationStarted {
            _ = try? await monitor.cancelMigration()
            for _ in 0..<500 {
                guard let state = try? await monitor.migrationState() else { break }
                if ["cancelled", "failed", "completed", "none"].contains(state.status) { break }
                await loop.sleep(for: .milliseconds(10))
            }
        }
        for disk in disks where disk.hasJob {
            let name = disk.jobName(plan.id)
            _ = try? await monitor.cancelMirror(name, force: true)
            for _ in 0..<1000 {
                guard let job = try? await monitor.job(name) else { break }
                if job.status == "concluded" {
                    _ = try? await monitor.dismiss(name)
                    break
                }
                await loop.sleep(for: .milliseconds(10))
            }
        }
        for disk in disks where disk.hasTarget { _ = try? await monitor.removeNode(disk.targetNode(plan.id)) }
        await forgetMigrationSettings(monitor)
        guard hasMigrationStarted, monitor.isConnected else { return monitor.isConnected }
        return await resume(monitor)
    }

    /// QEMU resumes a guest by itself after a failed or cancelled migration, but not after a completed one.
    func resume(_ monitor: QMPClient) async -> Bool {
        for _ in 0..<500 {
            guard let status = try? await monitor.status() else { break }
            if status == "running" { return true }
            if status == "postmigrate" || status == "paused" { _ = try? await monitor.resume() }
            await loop.sleep(for: .milliseconds(10))
        }
        return (try? await monitor.status()) == "running"
    }

    /// Other tools that use this QEMU must find what they are used to.
    private func forgetMigrationSettings(_ monitor: QMPClient) async {
        if !enabledCapabilities.isEmpty { try? await monitor.setCapabilities(enabledCapabilities, to: false) }
        if !earlierParameters.isEmpty { try? await monitor.setMigrationParameters(earlierParameters) }
    }

    /// A destination that was asked to prepare keeps everything until it hears this.
    private func tellDestination(_ reason: String) async -> Bool {
        if let overruler { return await tellOverruling(by: overruler) }
        if let control, control.failure == nil {
            try? await control.send(.abort(reason))
            // Answers to what was asked before may still be on their way.
            while let answer = try? await control.next(timeout: .seconds(10)) {
                if case .abort = answer { return true }
            }
        }
        // Before it was ready, the destination gives up by itself at once, and before it was asked to prepare in a while.
        guard mayBePrepared || isAwaited else { return true }
        let end = ContinuousClock.now + .seconds(mayBePrepared ? 30 : 10)
        while ContinuousClock.now < end {
            if let (control, welcome) = try? await ControlConnection.open(plan, credentials: credentials, on: loop) {
                defer { control.close() }
                if let by = welcome.takenBy {
                    await learnOverruling(by: by)
                    return false
                }
                // It has never heard of this migration, and cannot become the owner.
                if welcome.state == .new { return true }
                try? await control.send(.abort(reason))
                if let answer = try? await control.next(timeout: .seconds(5)), case .abort = answer { return true }
            }
            await loop.sleep(for: .milliseconds(500))
        }
        guard mayBePrepared else { return true }
        warn(
            "The destination \(plan.host) could not be told of the roll-back and keeps its copy, paused; run 'crossdock recover "
                + "\(plan.id)' once it can be reached"
        )
        return false
    }
}
