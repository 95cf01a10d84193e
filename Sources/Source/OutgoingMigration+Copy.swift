internal import Emulator
internal import IO
internal import Migration

/// From the first look at the guest until its memory is through.
extension OutgoingMigration {
    // MARK: Before anything moves

    func check() async throws -> SourceHandover.Event {
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
                self?.memory.loseInQEMU(watch, nil)
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

    func offer() async throws -> SourceHandover.Event {
        let (monitor, record, watch) = try guest()
        let inspection = try await GuestOffering.inspect(monitor, record, plan)
        let offering = try await GuestOffering(inspection, plan, record, on: context.dataLoops)
        self.offering = offering
        mirrors.disks = offering.disks
        if let shortage = DescriptorBudget.shortage(disks: offering.disks.count, connections: plan.firstConnections) {
            throw MigrationError(.guest, "The source agent: \(shortage), or take fewer --connections")
        }
        description = try await GuestDescriptionWatch(monitor)
        try await checkImages(record)
        for disk in inspection.disks where !disk.bitmaps.isEmpty {
            context.warn(
                "The dirty bitmaps of disk '\(disk.name)' (\(disk.bitmaps.joined(separator: ", "))) do not move; the next backup "
                    + "there has to be a whole one"
            )
        }
        context.report.disks = offering.offer.disks.map { .init(name: $0.name, size: $0.size) }
        let rehearsal = Rehearsal(context, link, monitor, inspection, record.process, known, turn: rehearsalTurn)
        self.rehearsal = rehearsal
        try await rehearsal.begin()
        try await link.open()
        guard plan.seeds == nil || link.features.contains(.seeds) else {
            throw MigrationError(
                .refused,
                "The agent on \(plan.host) is too old for --seed: leave it out, or install this version there"
            )
        }
        guard offering.offer.networks == nil || link.features.contains(.networks) else {
            throw MigrationError(
                .refused,
                "The agent on \(plan.host) is too old for --network: make the taps there and leave it out, or install this version there"
            )
        }
        try checkVerdict(watch.guest)
        if !plan.isRehearsal {
            try begin(monitor)
            link.secrets = inspection.secrets
            mirrors.dial()
        }
        let probe = try await rehearsal.probe()
        try await link.sendSecrets()
        try await link.connection().send(.offer(offering.offer))
        rehearsed = try await rehearsal.rehearse(offering.offer, probe)
        exchange = try proveLineages(rehearsal.seedNonce)
        guard plan.isRehearsal else { return .rehearsed }
        // The destination forgets it, and nothing was changed here.
        context.report.outcome = .rehearsed
        _ = await link.tell("The rehearsal is over", patience: nil)
        return .rehearsalIsOver
    }

    /// From here on somebody closes what an agent that dies has left open.
    func begin(_ monitor: QMPClient) throws {
        try DurableFile.makeDirectory(context.files.directory)
        try startWatchdog(monitor)
        let journal = try Journal(creating: context.files.journal)
        try journal.append(
            .offered(guest: plan.guest, destination: plan.host, order: try context.migrations.nextOrder())
        )
        self.journal = journal
        nameLineages()
        try SavedDisk.save(mirrors.disks, context.files)
        noteGuest()
    }

    func makeReady() async throws -> SourceHandover.Event {
        guard let offering, let record else { throw MigrationError(.failed, "The guest was not offered") }
        let control = try await link.connection()
        try await control.send(.rehearsed(rehearsed))
        // The destination reads what it has under the same names; a gigabyte a second is slow for SHA-256.
        let known =
            offering.offer.files.reduce(0) { $0 + $1.size }
            + offering.offer.disks.flatMap(\.backing).reduce(0) { $0 + $1.size }
        // So does copying the images that the plan names.
        let copied = offering.offer.disks.reduce(0) { $0 + ($1.seed == nil ? 0 : $1.size) }
        let copyTime = Duration.seconds(Int(clamping: copied >> 25))
        var answer = try await control.next(timeout: .seconds(60 + Int(clamping: known >> 26)) + copyTime)
        if case .need(let wanted) = answer {
            for index in wanted {
                try await offering.send(index, over: control) { try self.context.checkFault() }
            }
            answer = try await control.next(timeout: .seconds(120) + copyTime)
        }
        let ready = try GuestOffering.readiness(answer, plan)
        acceptSeeds(ready)
        await compareListeners(ready)
        link.isResumable = true
        try await mirrors.connect(ready, client: record.process?.pid)
        return .ready
    }

    /// Whoever looks for a display where it was is told where it will be.
    private func compareListeners(_ ready: Message.Ready) async {
        guard let monitor, let there = ready.listeners else { return }
        for listener in await monitor.listeners() {
            guard let other = there.first(where: { $0.what == listener.what }), other.address != listener.address else {
                continue
            }
            context.warn(
                "The \(listener.what) of guest '\(plan.guest)' listens on \(listener.address) here, and will on "
                    + "\(MigrationContext.said(other.address)) on \(plan.host)"
            )
        }
    }

    // MARK: The copy

    func copy() async throws -> SourceHandover.Event {
        let (monitor, _, _) = try guest()
        var place = try await copyPlace()
        context.enter("disks")
        // From here on there is something in QEMU that must not be left alone.
        try startWatchdog(monitor)
        memory.watch(monitor)
        try await mirrors.copy(monitor) { try await self.checkDescription(.everything) }
        context.report.copiedBytes = mirrors.dataBytes
        // What follows leaves the line to the next guest's disks.
        withExtendedLifetime(place) { place = nil }
        context.enter("verify")
        try await mirrors.verify()
        return .inSync
    }

    /// Waits for one of the evacuation's places for copies; nil for a migration by itself.
    private func copyPlace() async throws -> FileLock? {
        guard plan.evacuation != nil, let places = plan.copyPlaces else { return nil }
        let files = EvacuationFiles(stateDirectory: plan.stateDirectory)
        if let place = try files.takePlace(of: places) { return place }
        context.enter("queue")
        while true {
            try await context.wait(.milliseconds(50))
            if let place = try files.takePlace(of: places) { return place }
        }
    }

    func send() async throws -> SourceHandover.Event {
        let (monitor, record, watch) = try guest()
        try await takeTurn()
        if !mirrors.isVerified {
            context.enter("verify")
            try await mirrors.verify()
        }
        try await checkDescription(.everything)
        try await watch.settle()
        try checkVerdict(watch.guest)
        context.enter("memory")
        await mirrors.promiseBarrier()
        memory.beforePause = { [unowned self] in await releaseInput() }
        try await memory.send(monitor, watch, record) { try self.startWatchdog(monitor) }
        try await watch.settle()
        try checkVerdict(watch.guest)
        context.enter("switchover")
        return .stopped(.init(since: watch.stoppedAt, guest: watch.guest))
    }

    func retry(_ reason: String) async throws -> SourceHandover.Event {
        let (monitor, _, watch) = try guest()
        try await memory.prepareRetry(monitor, watch, reason)
        deadline?.cancel()
        watchdog?.guestRuns()
        turn = nil
        context.warn("The memory did not get through: \(reason). The guest stays here; sending it again")
        try await memory.waitForRetry()
        try await mirrors.catchUp(monitor) { try await self.checkDescription(.everything) }
        return .mayRetry
    }

    // MARK: What the guest does

    func guestChanged(_ state: RunState) {
        noteGuest()
        do { try checkVerdict(state) } catch { context.fail(Self.reason(of: error)) }
    }

    /// A guest is released only in a state in which the destination can own it.
    func checkVerdict(_ state: RunState) throws {
        switch state.verdict {
        case .stays(let why): throw MigrationError(.guest, "Guest '\(plan.guest)' cannot move: \(why)")
        case .stands, .runs:
            if state == .running { return }
            guard link.features.contains(.runState) else {
                throw MigrationError(
                    .refused,
                    "Guest '\(plan.guest)' does not run (\(state.sentence)), and the agent on \(plan.host) is too old to keep it so: it "
                        + "would resume it. Resume it here first, or install this version there"
                )
            }
            if record?.isOff == true, !link.features.contains(.stoppedGuests) {
                throw MigrationError(
                    .refused,
                    "Guest '\(plan.guest)' is off, and the agent on \(plan.host) is too old to keep it so; start it first, or install this "
                        + "version there"
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
    func checkDescription(_ extent: GuestDescriptionWatch.Extent) async throws {
        if let displaced = fence?.displaced(), !displaced.isEmpty {
            throw MigrationError(
                .guest,
                "Guest '\(plan.guest)' cannot be released: \(displaced.joined(separator: "; "))"
            )
        }
        try await compareDescription(extent)
    }

    func compareDescription(_ extent: GuestDescriptionWatch.Extent) async throws {
        guard let differences = try await description?.differences(extent), !differences.isEmpty else { return }
        throw MigrationError(
            .guest,
            "Guest '\(plan.guest)' was changed while it was migrated: \(differences.prefix(10).joined(separator: "; ")). The other "
                + "host would have undone that; migrate it again"
        )
    }

    /// What the guest is doing, for whoever takes this agent's place.
    func noteGuest() {
        guard let watch, journal != nil else { return }
        do { try Self.note(watch.guest, context.files) } catch { context.warn("\(error)") }
    }

    var notedGuest: RunState { Self.noted(context.files) }
}
