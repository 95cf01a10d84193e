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
    var enabledCapabilities: [String] = []
    var earlierParameters: [String: JSONValue] = [:]
    private var deadline: LoopTimer?
    private var isRolledBack = false
    private static let superseded = "Its source agent ended; a later migration followed"
    private var guestLock: FileLock?

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
    /// - Throws: the reason to stop, if there is one.
    func wait(_ time: Duration) async throws {
        if let fault { throw fault }
        let timer = loop.schedule(after: time) { self.changed.signal() }
        defer { timer.cancel() }
        await changed.wait()
        if let fault { throw fault }
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
            enter("memory")
            try await sendMemory()
            enter("switchover")
            try await switchOver()
            await handOver()
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
        }
        report.ramBytesSent = stream?.bytesSent ?? 0
        report.totalMS = milliseconds(since: began)
        if let control {
            let count = 1 + (stream?.connections ?? 0) + disks.reduce(0) { $0 + ($1.relay?.connections ?? 0) }
            report.tls = .init(version: control.session.version, cipher: control.session.cipher, connections: count)
        }
        stream?.abort("The migration is over")
        await shadow?.stop()
        control?.close()
        monitor?.close()
        guestLock = nil
        if let text = try? MigrationReportFile.save(report, migrations) { warn(text) }
        var event = event("finished")
        event.report = report
        emit(event)
        return report
    }

    /// Ends a migration whose source agent has died, from what its journal says.
    ///
    /// Without RELEASED the guest belongs to this host: jobs and nodes that are left are removed, a paused guest is
    /// resumed, the destination is told. With RELEASED it belongs to the destination, which is asked until it confirms.
    ///
    /// - Returns: the report.
    /// - Throws: `MigrationError` with `busy` when the agent still lives, `guest` when there is nothing to recover.
    public func recover() async throws -> MigrationReport { try await loop.run { try await self.resumeFromJournal() } }

    private func resumeFromJournal() async throws -> MigrationReport {
        guard let lock = try migrations.lock(guest: plan.guest) else {
            throw MigrationError(.busy, "The source agent of migration \(plan.id) still works; see 'crossdock status'")
        }
        guestLock = lock
        let records = try Journal.read(migrations.journal(of: plan.id))
        guard case .offered = records.first, !records.isRolledBack, !records.contains(.confirmed) else {
            throw MigrationError(.guest, "Migration \(plan.id) has nothing to recover; see 'crossdock status'")
        }
        journal = try Journal(opening: migrations.journal(of: plan.id))
        guard try migrations.latest(of: plan.guest) == plan.id else {
            // A later migration has decided about the guest: neither QEMU nor the images are this one's to touch.
            if !records.contains(.released) { try journal?.append(.rolledBack(reason: Self.superseded)) }
            throw MigrationError(.guest, "Migration \(plan.id) was followed by a later one of guest '\(plan.guest)'")
        }
        guard let known = try guests.load(plan.guest) else {
            throw MigrationError(.guest, "The record of guest '\(plan.guest)' is gone")
        }
        record = known
        if known.process?.isRunning == true {
            // Without its monitor nothing can be said about the guest, so nothing is decided.
            let connected = try await QMPClient.connect(to: guests.agentMonitor(of: known), on: loop)
            monitor = connected
        }
        if records.contains(.released) {
            isReleased = true
            for (index, saved) in savedDisks().enumerated() {
                let name = "disk\(index)"
                var disk = SourceDisk(
                    offer: .init(name: name, size: saved.size, allocated: 0, path: saved.path),
                    node: "",
                    path: saved.path
                )
                disk.format = saved.format
                disk.isSealed = saved.isSealed
                disks.append(disk)
                report.disks.append(.init(name: name, size: saved.size))
            }
            await handOver()
            await finish()
        } else {
            mayBePrepared = true
            fault = MigrationError(.failed, "The source agent ended before the guest was released")
            if let monitor {
                hasMigrationStarted = ["setup", "active", "pre-switchover", "device", "completed"]
                    .contains(try await monitor.migrationState().status)
                try? await clearLeftovers(monitor)
            }
            await rollBack(fault ?? MigrationError(.failed, ""))
            // The roll-back is what was asked for; what is left of it is in the warnings.
            report.code = isRolledBack ? 0 : MigrationError.Code.failed.rawValue
        }
        control?.close()
        monitor?.close()
        guestLock = nil
        if let text = try? MigrationReportFile.save(report, migrations) { warn(text) }
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
            if !plan.isRehearsal { try closeSuperseded() }
            if let release = try migrations.release(of: plan.guest) {
                throw MigrationError(
                    .guest,
                    "Guest '\(plan.guest)' was released to \(release.destination) by migration \(release.migration)"
                )
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
                throw MigrationError(.guest, "Guest '\(plan.guest)' is in the state '\(status)', not running")
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

    /// Ends the journals of earlier migrations of this guest whose agents died before the release: this one takes over.
    private func closeSuperseded() throws {
        for id in migrations.ids() {
            let records = try Journal.read(migrations.journal(of: id))
            guard case .offered(plan.guest, _, _) = records.first, !records.contains(.released), !records.isRolledBack
            else {
                continue
            }
            try Journal(opening: migrations.journal(of: id)).append(.rolledBack(reason: Self.superseded))
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
            case "failed":
                if stream != nil { fail(MigrationError(.failed, "QEMU reports that the migration failed")) }
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
        }
    }

    // MARK: release

    /// The decision. When this returns the guest belongs to the destination and runs there.
    private func handOver() async {
        deadline?.cancel()
        control?.interruption = nil
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
                let answer = try await control.ask(.release, timeout: .seconds(30))
                guard case .owned(let owned) = answer else {
                    throw MigrationError(.undecided, "it answered RELEASE with \(answer.name)")
                }
                if let stoppedAt { report.blackoutMS = milliseconds(since: stoppedAt) }
                report.outcome = .migrated
                for index in disks.indices {
                    report.disks[index].digestDestination = owned.digests[disks[index].offer.name]
                }
                do { try journal?.append(.confirmed) } catch { warn("\(error)") }
                return
            } catch {
                warn(
                    "Guest '\(plan.guest)' was released to \(plan.host), which has not confirmed yet: \(error). It must "
                        + "not be started here; trying again"
                )
                control?.close()
                await loop.sleep(for: delay)
                delay = min(delay * 2, .seconds(10))
            }
        }
    }

    /// Puts the old images out of reach of whatever might start the guest again.
    private func fence() {
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

    /// Notes for people and for the deletion of the old images; the journal has decided already, so that this need not
    /// happen while the guest is paused.
    private func rememberRelease() {
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

    /// Ends the old QEMU and compares the images.
    private func finish() async {
        rememberRelease()
        _ = try? await control?.ask(.done, timeout: .seconds(10))
        monitor?.onDisconnect = nil
        await monitor?.quit()
        await record?.process?.terminate()
        if let record, record.adopted == nil {
            for name in ["qmp.sock", "status.sock"] { unlink("\(guests.directory(of: record.name))/\(name)") }
        }
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

    private func rollBack(_ error: any Error) async {
        let reason =
            fault ?? (error as? MigrationError)
            ?? MigrationError((error as? CredentialError) != nil ? .security : .failed, "\(error)")
        fault = reason
        deadline?.cancel()
        control?.interruption = nil
        report.outcome = .rolledBack
        report.reason = reason.message
        report.code = reason.code.rawValue
        stream?.abort(reason.message)
        for disk in disks { disk.relay?.abort(reason.message) }
        var isRestored = true
        if record?.process?.isRunning == true, hasMigrationStarted || disks.contains(where: \.hasTarget) {
            if monitor?.isConnected != true {
                if let record { monitor = try? await QMPClient.connect(to: guests.agentMonitor(of: record), on: loop) }
            }
            if let monitor, monitor.isConnected { isRestored = await restoreGuest(monitor) } else { isRestored = false }
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
        // QEMU resumes a guest by itself after a failed or cancelled migration, but not after a completed one.
        for _ in 0..<100 {
            guard let status = try? await monitor.status() else { break }
            if status == "running" { break }
            if status == "postmigrate" || status == "paused" { _ = try? await monitor.resume() }
            await loop.sleep(for: .milliseconds(20))
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
        if let control, control.failure == nil {
            try? await control.send(.abort(reason))
            // Answers to what was asked before may still be on their way.
            while let answer = try? await control.next(timeout: .seconds(10)) {
                if case .abort = answer { return true }
            }
        }
        // Before it was asked to prepare, the destination gives up by itself.
        guard mayBePrepared else { return true }
        let end = ContinuousClock.now + .seconds(30)
        while ContinuousClock.now < end {
            if let (control, welcome) = try? await ControlConnection.open(plan, credentials: credentials, on: loop) {
                defer { control.close() }
                if !["offered", "prepared"].contains(welcome.state) { return true }
                try? await control.send(.abort(reason))
                if let answer = try? await control.next(timeout: .seconds(5)), case .abort = answer { return true }
            }
            await loop.sleep(for: .milliseconds(500))
        }
        warn(
            "The destination \(plan.host) could not be told of the roll-back and keeps its copy, paused; run 'crossdock recover "
                + "\(plan.id)' once it can be reached"
        )
        return false
    }
}
