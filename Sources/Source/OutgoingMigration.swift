internal import Emulator
internal import Glibc
public import IO
public import Migration
internal import NBD
public import TLS

/// One migration, seen from the source: it carries out what `SourceHandover` says is to be done, and tells it what came of that.
///
/// Confined to its control loop. Until RELEASED is durable every failure ends with the guest here, as it was, and nothing left
/// behind; from then on the guest belongs to the destination and only its word ends the migration.
public final class OutgoingMigration: @unchecked Sendable {
    // Unchecked: confined to the control loop.
    static let superseded = "Its source agent ended; a later migration followed"

    let context: MigrationContext
    let link: DestinationLink
    let mirrors: DiskMirrors
    let memory: MemoryTransfer
    var handover = SourceHandover.checking
    var record: GuestRecord?
    var monitor: QMPClient?
    var watch: GuestWatch?
    var guestLock: FileLock?
    var journal: Journal?
    private var offering: GuestOffering?
    private var rehearsal: Rehearsal?
    private var rehearsed = Message.Rehearsed()
    private var description: GuestDescriptionWatch?
    private var watchdog: SwitchoverWatchdog?
    private var deadline: LoopTimer?
    var fence: ImageFence?
    /// Who has taken the guest for this host although it was released; the destination is told instead of asked.
    var overruler: String?
    /// How often QEMU had said that it runs the guest when it completed the migration.
    private var resumesAtCompletion = 0
    /// The digests of the images, read in full while the guest is paused.
    private var fullDigests: [String: String] = [:]
    private var owned: Message.Owned?

    var plan: MigrationPlan { context.plan }

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
        context = MigrationContext(
            plan: plan,
            credentials: credentials,
            loop: loop,
            dataLoops: dataLoops,
            emit: emit
        )
        link = DestinationLink(context)
        mirrors = DiskMirrors(context, link)
        memory = MemoryTransfer(context, link, mirrors)
        context.mayBeInterrupted = { [unowned self] in handover.mayBeInterrupted }
        context.onFault = { [unowned self] in link.interrupt($0) }
        link.onReconnect = { [unowned self] in mirrors.move(to: $0) }
        mirrors.onOutage = { [unowned self] in
            // QEMU pauses a guest that dirties nothing whatever the downtime limit is, and then waits for the mirrors.
            if case .sending = handover, watch?.isAtSwitchover == false {
                memory.lose("The destination is away, or has no space")
            }
        }
    }

    // MARK: From outside

    /// Asks for a roll-back. Without effect once the guest was released. From any thread.
    public func cancel() {
        context.loop.execute { self.context.fail(MigrationError(.cancelled, "The migration was cancelled")) }
    }

    /// Migrates the guest, or leaves everything as it was.
    ///
    /// - Returns: the report; its `code` is the exit code.
    public func start() async throws -> MigrationReport {
        try await context.loop.run {
            await self.carryOut()
            return await self.conclude()
        }
    }

    // MARK: The conductor

    /// Carries out one duty after another until there is none.
    func carryOut() async {
        while let duty = handover.duty {
            let event: SourceHandover.Event
            do {
                event = try await perform(duty)
                if handover.mayBeInterrupted { try context.checkFault() }
            } catch let lost as MemoryLost {
                handover.take(mirrors.areWhole ? .memoryLost(lost.reason) : .failed(.init(.failed, lost.reason)))
                continue
            } catch {
                handover.take(.failed(context.fault ?? Self.reason(of: error)))
                continue
            }
            handover.take(event)
        }
    }

    private static func reason(of error: any Error) -> MigrationError {
        (error as? MigrationError) ?? MigrationError(error is CredentialError ? .security : .failed, "\(error)")
    }

    private func perform(_ duty: SourceHandover.Duty) async throws -> SourceHandover.Event {
        switch duty {
        case .check: try await check()
        case .offer: try await offer()
        case .ready: try await makeReady()
        case .copy: try await copy()
        case .send: try await send()
        case .retry(let reason): try await retry(reason)
        case .endMirrors: try await endMirrors()
        case .ask: try await ask()
        case .continue: try await complete()
        case .fence: try await raiseFence()
        case .freeze: try await freeze()
        case .look: try await look()
        case .writeReleased: try await writeReleased()
        case .abandon(let reason): await abandon(reason)
        case .release(let pause): await release(pause)
        case .finish: await finish()
        case .writeReclaimed(let reason): await writeReclaimed(reason)
        case .restore(let rollBack): await restore(rollBack)
        case .tell(let rollBack): await tell(rollBack)
        case .writeRolledBack(let reason): try await writeRolledBack(reason)
        }
    }

    private func guest() throws -> (monitor: QMPClient, record: GuestRecord, watch: GuestWatch) {
        guard let monitor, let record, let watch else { throw MigrationError(.failed, "The guest is not known yet") }
        return (monitor, record, watch)
    }

    // MARK: Before anything moves

    private func check() async throws -> SourceHandover.Event {
        context.enter("check")
        let guest = try await SourceGuest.open(context)
        (record, monitor, guestLock) = (guest.record, guest.monitor, guest.lock)
        let watch = try await GuestWatch(context, guest.monitor)
        self.watch = watch
        watch.onPause = { [unowned self] in paused(since: $0) }
        watch.onChange = { [unowned self] in guestChanged($0) }
        guest.monitor.onEvent = { [weak self] event in
            self?.watch?.handle(event)
            self?.mirrors.handle(event)
            if event.name == "MIGRATION", event.data["status"]?.string == "failed", case .sending? = self?.handover {
                self?.memory.lose("QEMU reports that the migration failed")
            }
            self?.context.wake()
        }
        guest.monitor.onDisconnect = { [weak self] in
            self?.context.fail(
                MigrationError(.failed, "QEMU of guest '\(self?.plan.guest ?? "")' ended or closed its monitor")
            )
        }
        return .checked
    }

    private func offer() async throws -> SourceHandover.Event {
        let (monitor, record, watch) = try guest()
        let inspection = try await GuestOffering.inspect(monitor, record, plan)
        let offering = try await GuestOffering(inspection, plan, on: context.dataLoops)
        self.offering = offering
        mirrors.disks = offering.disks
        description = try await GuestDescriptionWatch(monitor)
        try await checkImages(record)
        for disk in inspection.disks where !disk.bitmaps.isEmpty {
            context.warn(
                "The dirty bitmaps of disk '\(disk.name)' (\(disk.bitmaps.joined(separator: ", "))) do not move; the next backup "
                    + "there has to be a whole one"
            )
        }
        context.report.disks = offering.offer.disks.map { .init(name: $0.name, size: $0.size) }
        try await link.open()
        try checkVerdict(watch.guest)
        let rehearsal = Rehearsal(context, link, monitor, inspection)
        self.rehearsal = rehearsal
        let measure = try await rehearsal.probe()
        if !plan.isRehearsal {
            try begin(monitor)
            link.secrets = inspection.secrets
        }
        try await link.sendSecrets()
        try await link.connection().send(.offer(offering.offer))
        rehearsed = try await rehearsal.rehearse(offering.offer, measure)
        guard plan.isRehearsal else { return .rehearsed }
        // The destination forgets it, and nothing was changed here.
        context.report.outcome = .rehearsed
        _ = await link.tell("The rehearsal is over", patience: nil)
        return .rehearsalIsOver
    }

    /// From here on somebody closes what an agent that dies has left open.
    private func begin(_ monitor: QMPClient) throws {
        try DurableFile.makeDirectory(context.files.directory)
        try startWatchdog(monitor)
        let journal = try Journal(creating: context.files.journal)
        try journal.append(
            .offered(guest: plan.guest, destination: plan.host, order: try context.migrations.nextOrder())
        )
        self.journal = journal
        try SavedDisk.save(mirrors.disks, context.files)
        noteGuest()
    }

    private func makeReady() async throws -> SourceHandover.Event {
        guard let offering, let record else { throw MigrationError(.failed, "The guest was not offered") }
        let control = try await link.connection()
        try await control.send(.rehearsed(rehearsed))
        // The destination reads what it has under the same names; a gigabyte a second is slow for SHA-256.
        let known =
            offering.offer.files.reduce(0) { $0 + $1.size }
            + offering.offer.disks.flatMap(\.backing).reduce(0) { $0 + $1.size }
        var answer = try await control.next(timeout: .seconds(60 + Int(clamping: known >> 26)))
        if case .need(let wanted) = answer {
            for index in wanted {
                try await offering.send(index, over: control) { try self.context.checkFault() }
            }
            answer = try await control.next(timeout: .seconds(120))
        }
        let ready = try GuestOffering.readiness(answer, plan)
        link.isResumable = true
        try await mirrors.connect(ready, client: record.process?.pid)
        return .ready
    }

    // MARK: The copy

    private func copy() async throws -> SourceHandover.Event {
        let (monitor, _, _) = try guest()
        context.enter("disks")
        // From here on there is something in QEMU that must not be left alone.
        try startWatchdog(monitor)
        try await mirrors.copy(monitor) { try await self.checkDescription(.everything) }
        context.enter("verify")
        try await mirrors.verify()
        return .inSync
    }

    private func send() async throws -> SourceHandover.Event {
        let (monitor, record, watch) = try guest()
        if !mirrors.isVerified {
            context.enter("verify")
            try await mirrors.verify()
        }
        try await checkDescription(.everything)
        try await watch.settle()
        try checkVerdict(watch.guest)
        context.enter("memory")
        try await memory.send(monitor, watch, record) { try self.startWatchdog(monitor) }
        try await watch.settle()
        try checkVerdict(watch.guest)
        context.enter("switchover")
        return .stopped(.init(since: watch.stoppedAt, guest: watch.guest))
    }

    private func retry(_ reason: String) async throws -> SourceHandover.Event {
        let (monitor, _, watch) = try guest()
        try await memory.prepareRetry(monitor, watch, reason)
        deadline?.cancel()
        watchdog?.guestRuns()
        context.warn("The memory did not get through: \(reason). The guest stays here; sending it again")
        try await memory.waitForRetry()
        try await mirrors.catchUp(monitor) { try await self.checkDescription(.everything) }
        return .mayRetry
    }

    // MARK: The switchover

    private func endMirrors() async throws -> SourceHandover.Event {
        let (monitor, _, _) = try guest()
        // The loss was noticed when the guest was paused already.
        if mirrors.isAway { memory.lose("The destination is away, or has no space") }
        try context.check()
        try await mirrors.end(monitor)
        try await checkDescription(.drives)
        return .mirrorsEnded
    }

    private func ask() async throws -> SourceHandover.Event {
        let prepared = Message.Prepared(proofs: try await mirrors.proofs(), isFull: plan.verifiesFully)
        let answer = try await link.ask(.prepared(prepared), timeout: .milliseconds(plan.blackoutDeadline))
        guard case .prepared = answer else { throw MigrationError(.failed, "The destination is not prepared") }
        return .prepared
    }

    private func complete() async throws -> SourceHandover.Event {
        let (monitor, _, watch) = try guest()
        resumesAtCompletion = watch.resumes
        async let users = others()
        try await memory.complete(monitor)
        if plan.verifiesFully {
            for disk in mirrors.disks {
                guard let digest = await disk.digest(at: disk.path, on: context.dataLoops) else {
                    throw MigrationError(.failed, "The image \(disk.path) cannot be read for --verify=full")
                }
                fullDigests[disk.offer.name] = digest
                try context.checkFault()
            }
        }
        if let users = await users { throw MigrationError(.guest, users) }
        return .completed
    }

    /// Puts the images out of reach of whatever might start the guest on its own, while QEMU still has what it sent.
    private func raiseFence() async throws -> SourceHandover.Event {
        guard let fence else { return .fenced }
        try await BlockingPool.shared.run { try fence.raise() }
        return .fenced
    }

    /// Other clients of QEMU can say `cont` at any moment, and QEMU obeys.
    private func freeze() async throws -> SourceHandover.Event {
        let (monitor, record, _) = try guest()
        guard try await monitor.runState() == .postmigrate else {
            throw MigrationError(.failed, "QEMU left the state 'postmigrate' before the guest was released")
        }
        guard let process = record.process else { throw MigrationError(.failed, "QEMU's process is not known") }
        guard try await BlockingPool.shared.run({ try process.freeze() }) else {
            throw MigrationError(.failed, "Somebody else has stopped QEMU (process \(process.pid)) with a signal")
        }
        return .frozen
    }

    /// What QEMU has said until it was frozen.
    private func look() async throws -> SourceHandover.Event {
        let (monitor, _, watch) = try guest()
        await monitor.drain()
        guard watch.resumes == resumesAtCompletion else {
            throw MigrationError(
                .failed,
                "Another client of QEMU's monitor has resumed the guest (cont) when it was about to be released"
            )
        }
        return .stoodStill
    }

    private func writeReleased() async throws -> SourceHandover.Event {
        do { try await journal?.write(.released) } catch let error as JournalError {
            let reason = MigrationError(.failed, "\(error)")
            if error.kind == .doubtful { return .doubtful(reason) }
            throw reason
        }
        watchdog?.guestIsReleased()
        return .written
    }

    // MARK: The release

    private func abandon(_ reason: String) async -> SourceHandover.Event {
        link.shield()
        while true {
            context.warn(
                "Whether guest '\(plan.guest)' was released could not be made durable. It stays paused until \(plan.host) "
                    + "has given it up"
            )
            switch await link.tell(reason, patience: .seconds(30)) {
            case .acknowledged: return .abandoned
            case .overruled(let by): return .overruled(by: by)
            case .silent: await context.loop.sleep(for: .seconds(1))
            }
        }
    }

    private func release(_ pause: SourceHandover.Pause) async -> SourceHandover.Event {
        deadline?.cancel()
        link.shield()
        context.enter("release")
        await fenceAgain()
        // A full comparison reads all that the destination has.
        let patience = 30 + (fullDigests.isEmpty ? 0 : Int(mirrors.disks.reduce(0) { $0 + $1.offer.size } >> 26))
        let release = Message.Release(
            digests: fullDigests,
            runState: link.features.contains(.runState) || pause.guest != .running ? pause.guest : nil
        )
        let answer = await link.release(release, patience: .seconds(patience)) { error in
            self.context.warn(self.waiting(error))
        }
        guard case .owned(let owned) = answer else {
            if case .refused(let reason) = answer { return .refused(reason) }
            return .refused("it answered RELEASE with \(answer.name)")
        }
        self.owned = owned
        if let since = pause.since {
            let time = MigrationContext.milliseconds(ContinuousClock.now - since)
            context.report.blackoutMS = max(0, time - max(0, owned.sinceResumed ?? 0))
        }
        context.report.outcome = .migrated
        if pause.guest != .running { context.report.guestState = pause.guest }
        for (index, disk) in mirrors.disks.enumerated() where index < context.report.disks.count {
            context.report.disks[index].digestDestination = owned.digests[disk.offer.name]
        }
        do { try await journal?.write(.confirmed) } catch { context.warn("\(error)") }
        context.enter("done")
        return .owned
    }

    /// What the operator is told while the destination does not answer.
    private func waiting(_ error: any Error) -> String {
        "Guest '\(plan.guest)' was released to \(plan.host), which has not confirmed yet: \(error). It must not be started here; "
            + "trying again. If \(plan.host) is gone for good, 'crossdock recover \(plan.id) --take-ownership' says what can be done"
    }

    /// Ends the old QEMU and compares the images.
    private func finish() async -> SourceHandover.Event {
        rememberRelease()
        if let control = link.control { _ = try? await control.ask(.done, timeout: .seconds(10)) }
        await endEmulator()
        for (index, disk) in mirrors.disks.enumerated() where index < context.report.disks.count {
            await compare(disk, index)
            await disk.relay?.close()
        }
        return .finished
    }

    private func compare(_ disk: SourceDisk, _ index: Int) async {
        let path = whereabouts(of: disk)
        let digest = await disk.digest(at: path, on: context.dataLoops)
        context.report.disks[index].digestSource = digest
        let there = context.report.disks[index].digestDestination
        if disk.isSealed {
            context.warn(
                "The digests of \(disk.offer.name) could not be compared: its secret is not known any more"
            )
        } else if digest == nil || digest != there {
            context.report.code = MigrationError.Code.mismatch.rawValue
            let what =
                digest == nil || there == nil
                ? "could not be compared" : "differ: the guest has another disk there than it had here"
            context.report.reason =
                "The digests of \(disk.offer.name) \(what). The guest is on \(plan.host); the old image is kept as \(path)"
            FencedImages.keepForever(plan.id, context.migrations)
        }
    }

    // MARK: The way back

    private func writeReclaimed(_ reason: String) async -> SourceHandover.Event {
        while true {
            do {
                try await journal?.write(.reclaimed(reason: reason))
                return .written
            } catch {
                // A disk that is full may be emptied.
                context.warn("Guest '\(plan.guest)' stays paused until this can be written: \(error)")
                await context.loop.sleep(for: .seconds(1))
            }
        }
    }

    private func restore(_ rollBack: SourceHandover.RollBack) async -> SourceHandover.Event {
        let reason = rollBack.reason
        deadline?.cancel()
        link.shield()
        context.report.outcome = .rolledBack
        context.report.reason = reason.message
        context.report.code = reason.code.rawValue
        memory.abort(reason.message)
        mirrors.abort(reason.message)
        guard rollBack.hasTouchedGuest else { return .restored(true) }
        await liftFence()
        let problem = await restoreGuest()
        // The rest may take as long as the destination is away.
        if problem == nil { watchdog?.guestRuns() }
        await mirrors.closeRelays()
        if let problem {
            context.warn(
                "Guest '\(plan.guest)' may not be as it was: \(problem); run 'crossdock recover \(plan.id)' once its monitor answers"
            )
        }
        return .restored(problem == nil)
    }

    /// - Returns: what is not as it was; nil when everything is. A QEMU that has ended has nothing to restore.
    private func restoreGuest() async -> String? {
        guard let record, record.process?.isRunning == true else { return nil }
        if monitor?.isConnected != true {
            monitor = try? await context.guests.connect(to: record, on: context.loop)
        }
        var problem: String? = "its monitor does not answer"
        if let monitor, monitor.isConnected {
            problem = await GuestRestoration(monitor: monitor, guest: watch?.guest ?? notedGuest).run()
            await memory.forgetSettings(monitor)
        }
        // The monitor of a QEMU that ends is gone a moment before it is.
        for _ in 0..<100 where problem != nil && monitor?.isConnected != true && record.process?.isRunning == true {
            await context.loop.sleep(for: .milliseconds(20))
        }
        return record.process?.isRunning == true ? problem : nil
    }

    /// A destination that was asked to prepare keeps everything until it hears this.
    private func tell(_ rollBack: SourceHandover.RollBack) async -> SourceHandover.Event {
        if let overruler { return .told(await tellOverruling(by: overruler)) }
        let patience: Duration? =
            switch rollBack.telling {
            case .needless: nil
            case .helpful: .seconds(10)
            case .needed: .seconds(30)
            }
        switch await link.tell(rollBack.reason.message, patience: patience) {
        case .acknowledged: return .told(true)
        case .overruled(let by): return .overruled(by: by)
        case .silent:
            // Before it was asked to prepare it gives up by itself.
            guard rollBack.telling == .needed else { return .told(true) }
            context.warn(
                "The destination \(plan.host) could not be told of the roll-back and keeps its copy, paused; run 'crossdock recover "
                    + "\(plan.id)' once it can be reached"
            )
            return .told(false)
        }
    }

    private func writeRolledBack(_ reason: String) async throws -> SourceHandover.Event {
        do { try await journal?.write(.rolledBack(reason: reason)) } catch {
            context.warn("\(error)")
            throw error
        }
        return .written
    }

    // MARK: The end

    private func conclude() async -> MigrationReport {
        if case .over(.overruled(let by)) = handover { await learnOverruling(by) }
        mirrors.account()
        context.report.ramBytesSent = memory.stream?.bytesSent ?? 0
        if let control = link.control {
            let count = 1 + (memory.stream?.connections ?? 0) + mirrors.connections
            context.report.tls = .init(
                version: control.session.version,
                cipher: control.session.cipher,
                connections: count
            )
        }
        memory.abort("The migration is over")
        await rehearsal?.end()
        removeSockets()
        link.close()
        watchdog?.dismiss()
        monitor?.close()
        guestLock = nil
        context.finish()
        return context.report
    }

    func removeSockets() { for socket in context.files.sockets { unlink(socket) } }

    // MARK: The pause

    /// The guest is paused by the migration: from here on the blackout has a bound, whatever QEMU or the network wait for.
    private func paused(since instant: ContinuousClock.Instant?) {
        deadline?.cancel()
        guard let instant else {
            watchdog?.guestRuns()
            return
        }
        deadline = context.loop.schedule(after: .milliseconds(plan.blackoutDeadline)) {
            guard self.handover.mayPause else { return }
            let reason = "The guest was paused for \(self.plan.blackoutDeadline) ms, the blackout deadline"
            self.context.fail(MigrationError(.failed, reason))
            // QEMU may wait for the mirror or the stream; both end now, so that it answers again.
            self.mirrors.abort(reason)
            self.memory.abort(reason)
            guard let monitor = self.monitor else { return }
            let nodes = self.mirrors.targetNodes
            Task(executorPreference: self.context.loop) {
                async let yanked: Void? = try? monitor.yank(nodes: nodes, migration: true)
                // At pre-switchover QEMU does not notice that its stream is closed.
                async let cancelled: Void? = try? monitor.cancelMigration()
                _ = await (yanked, cancelled)
            }
        }
        watchdog?.guestStopped(at: instant)
    }

    /// Starts the process that looks after the guest when this one cannot.
    private func startWatchdog(_ monitor: QMPClient) throws {
        if let watchdog {
            if watchdog.isAlive { return }
            watchdog.dismiss()
            context.warn("The watchdog of this migration has ended; starting another one")
        }
        watchdog = try SwitchoverWatchdog(plan, monitor: monitor.descriptor, beating: context.loop)
    }

    // MARK: What the guest does

    private func guestChanged(_ state: RunState) {
        noteGuest()
        do { try checkVerdict(state) } catch { context.fail(Self.reason(of: error)) }
    }

    /// A guest is released only in a state in which the destination can own it.
    private func checkVerdict(_ state: RunState) throws {
        switch state.verdict {
        case .stays(let why): throw MigrationError(.guest, "Guest '\(plan.guest)' cannot move: \(why)")
        case .stands, .runs:
            if state == .running { return }
            guard link.features.contains(.runState) else {
                throw MigrationError(
                    .refused,
                    "Guest '\(plan.guest)' does not run (\(state.sentence)), and the agent on \(plan.host) is of an earlier version, "
                        + "which would resume it; resume it here first, or install this version there"
                )
            }
            guard state == .suspended else { return }
            let versions = [monitor?.version ?? "", context.report.rehearsal?.emulatorThere ?? monitor?.version ?? ""]
            guard versions.allSatisfy({ QMPClient.isVersion($0, atLeast: (9, 0)) }) else {
                throw MigrationError(
                    .guest,
                    "Guest '\(plan.guest)' sleeps, and a QEMU before version 9 wakes a sleeping guest when it moves; wake it first"
                )
            }
        }
    }

    /// What the destination was told of the guest must still be true.
    private func checkDescription(_ extent: GuestDescriptionWatch.Extent) async throws {
        guard let differences = try await description?.differences(extent), !differences.isEmpty else { return }
        throw MigrationError(
            .guest,
            "Guest '\(plan.guest)' was changed while it was migrated: \(differences.prefix(10).joined(separator: "; ")). The other "
                + "host would have undone that; migrate it again"
        )
    }

    /// What the guest is doing, for whoever takes this agent's place.
    private func noteGuest() {
        guard let watch, journal != nil else { return }
        do { try Self.note(watch.guest, context.files) } catch { context.warn("\(error)") }
    }

    private var notedGuest: RunState { Self.noted(context.files) }
}
