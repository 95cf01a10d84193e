internal import Emulator
internal import IO
internal import Migration

extension OutgoingMigration {
    /// Sends the memory until QEMU has paused the guest for the switchover.
    func sendMemory() async throws {
        guard let monitor, let record else { return }
        let attempt = memoryAttempts
        let socket = migrations.files(of: plan.id).streamSocket(attempt: attempt)
        guard case .stream = try await ask(.stream, timeout: .seconds(30)) else {
            throw MigrationError(.failed, "The destination does not wait for the memory")
        }
        let stream = try await OutgoingStream.start(
            socket: socket,
            plan: plan,
            credentials: credentials,
            client: record.process?.pid,
            on: dataLoops.next()
        ) { [weak self] reason in
            guard let self else { return }
            self.loop.execute { self.streamEnded(reason, attempt) }
        }
        self.stream = stream
        var capabilities = ["events", "return-path", "pause-before-switchover", "auto-converge"]
        if record.commandLine.has("uuid") { capabilities.append("validate-uuid") }
        try await monitor.setCapabilities(capabilities, to: true)
        enabledCapabilities = capabilities
        let changed: Set = [
            "max-bandwidth", "downtime-limit", "throttle-trigger-threshold", "cpu-throttle-initial",
            "cpu-throttle-increment", "max-cpu-throttle",
        ]
        if earlierParameters.isEmpty {
            let earlier = try await monitor.execute("query-migrate-parameters").object
            earlierParameters = earlier.filter { changed.contains($0.key) }
        }
        // The downtime limit is the gate: QEMU does not pause the guest while the disks have too much to send. The
        // throttle is kept from working until the rounds show that it is needed.
        try await monitor.setMigrationParameters([
            "max-bandwidth": .integer(plan.bandwidth == 0 ? 1 << 40 : Int64(plan.bandwidth)),
            "downtime-limit": 1,
            "throttle-trigger-threshold": 100,
            "cpu-throttle-initial": 1,
            "cpu-throttle-increment": 1,
            "max-cpu-throttle": 1,
        ])
        hasMigrationStarted = true
        // From here on QEMU may pause the guest.
        try startWatchdog(monitor)
        try await monitor.migrate(toSocket: socket)
        try await followMemory(monitor)
    }

    /// A stream that breaks after QEMU has finished is how streams end.
    private func streamEnded(_ reason: String, _ attempt: Int) {
        Task(executorPreference: loop) {
            if let state = try? await self.monitor?.migrationState(), state.status == "completed" { return }
            if attempt == self.memoryAttempts { self.memoryFailed(reason) }
        }
    }

    /// The memory did not get through. As long as the mirrors are whole it is sent again, from its start.
    func memoryFailed(_ reason: String) {
        // An attempt that went well for long has nothing to do with the trouble before it.
        if let began = attemptBegan, ContinuousClock.now - began > .seconds(plan.patience) { memoryTrouble = nil }
        let trouble = memoryTrouble ?? .now
        memoryTrouble = trouble
        // A stream that breaks again and again while the destination answers is bounded as an outage is.
        let isOver = memoryAttempts >= 2 && ContinuousClock.now - trouble > .seconds(plan.patience)
        guard areMirrorsWhole, memoryAttempts < Self.memoryAttemptsLimit, !isOver else {
            return fail(MigrationError(.failed, reason))
        }
        if memoryFault == nil { memoryFault = MemoryLost(reason: reason) }
        wake()
    }

    /// Sends the memory and switches over, several times when the link breaks meanwhile.
    func moveMemory() async throws {
        while true {
            do {
                if verifiedReconnects != report.reconnects {
                    // Another agent may be there, which has read back nothing yet.
                    enter("verify")
                    try await verifyDisks()
                }
                enter("memory")
                attemptBegan = .now
                isSendingMemory = true
                defer { isSendingMemory = false }
                try await sendMemory()
                enter("switchover")
                try await switchOver()
                return
            } catch let lost as MemoryLost {
                var lost: MemoryLost? = lost
                while let reason = lost?.reason {
                    guard areMirrorsWhole, fault == nil else { throw fault ?? MigrationError(.failed, reason) }
                    lost = nil
                    do { try await prepareRetry(reason) } catch let again as MemoryLost { lost = again }
                }
            }
        }
    }

    /// The guest runs on as if nothing had been tried, and the disks are still mirrored.
    private func prepareRetry(_ reason: String) async throws {
        guard let monitor else { return }
        memoryAttempts += 1
        stream?.abort(reason)
        // Before that QEMU reports how the guest came to this host.
        if hasMigrationStarted { try await endAttempt(monitor, reason) }
        deadline?.cancel()
        stoppedAt = nil
        isAtSwitchover = false
        memoryFault = nil
        watchdog?.guestRuns()
        warn("The memory did not get through: \(reason). The guest runs on here; sending it again")
        let pause = Duration.milliseconds(200 << min(memoryAttempts, 5))
        let end = ContinuousClock.now + pause
        while ContinuousClock.now < end { try await wait(end - .now) }
        _ = try await connectedControl()
        try await catchUp(monitor)
    }

    /// Cancels the migration in QEMU and has the guest run.
    private func endAttempt(_ monitor: QMPClient, _ reason: String) async throws {
        try await monitor.cancelMigration()
        while true {
            let state = try await monitor.migrationState()
            if ["cancelled", "failed", "none"].contains(state.status) { break }
            guard state.status != "completed" else { throw MigrationError(.failed, reason) }
            await loop.sleep(for: .milliseconds(5))
            if let fault { throw fault }
        }
        guard await resume(monitor) else { throw MigrationError(.failed, reason) }
        // A pause from now on is somebody else's.
        hasMigrationStarted = false
    }

    private func followMemory(_ monitor: QMPClient) async throws {
        var gateIsOpen = false
        var round = 0
        var peak = UInt64.max
        var idleRounds = 0
        var isThrottled = false
        var disksMeter = RateMeter()
        var diskConvergence = Convergence()
        while !isAtSwitchover {
            let state = try await monitor.migrationState()
            if state.status == "failed" || state.status == "cancelled" {
                memoryFailed("QEMU could not send the memory: \(state.error ?? state.status)")
            }
            try checkMemory()
            try await refreshJobs(monitor)
            disksMeter.add(diskDataBytes)
            // The guest is not paused for a destination that is away.
            let mayOpen = !isAway && fits(diskRemaining, max(disksMeter.peak, diskRate))
            if mayOpen != gateIsOpen {
                gateIsOpen = mayOpen
                let limit = mayOpen ? plan.downtimeLimit : 1
                try await monitor.setMigrationParameters(["downtime-limit": .integer(Int64(limit))])
            }
            if mayOpen || isAway {
                diskConvergence.reset()
            } else if diskConvergence.hasFailed(remaining: diskRemaining, rate: disksMeter.rate) {
                throw notConverged("disks", diskRemaining, disksMeter.rate)
            }
            let rate = state.megabitsPerSecond * 1e6 / 8
            let percent = state.total == 0 ? 0 : 100 * (1 - Double(state.remaining) / Double(state.total))
            progress(percent: percent, rate: rate, remaining: rate > 0 ? Double(state.remaining) / rate : nil)
            if gateIsOpen, state.rounds > round {
                // The first look after QEMU has gone through the memory shows what the guest dirtied meanwhile.
                let shrank = Double(state.remaining) < Double(peak) * 0.9
                idleRounds = shrank || round < 2 ? 0 : idleRounds + 1
                peak = state.remaining
                round = state.rounds
                if idleRounds >= 3, !isThrottled {
                    isThrottled = true
                    idleRounds = 0
                    warn("The guest writes its memory faster than it can be sent; slowing the guest down")
                    try await monitor.setMigrationParameters([
                        "max-cpu-throttle": 99, "cpu-throttle-initial": 20, "cpu-throttle-increment": 10,
                        "throttle-trigger-threshold": 25,
                    ])
                }
                if isThrottled, idleRounds >= Self.patienceWithThrottle {
                    throw notConverged("memory", state.remaining, rate)
                }
            }
            // The event may have come while QEMU was asked; the guest is paused then, so there is nothing to wait for.
            if !isAtSwitchover { try await wait(.milliseconds(100)) }
        }
    }

    /// The guest is paused: ends the mirrors, sends the rest of the memory, and releases the guest.
    ///
    /// When this returns RELEASED is durable.
    func switchOver() async throws {
        guard let monitor, let journal else { return }
        // The loss was noticed when the guest was paused already.
        if isAway { memoryFailed("The destination is away, or has no space") }
        try checkMemory()
        try await closeMirrors(monitor)
        let prepared = Message.Prepared(proofs: try await proofs(), isFull: plan.verifiesFully)
        mayBePrepared = true
        guard case .prepared = try await ask(.prepared(prepared), timeout: .milliseconds(plan.blackoutDeadline)) else {
            throw MigrationError(.failed, "The destination is not prepared")
        }
        if let fault { throw fault }
        try await monitor.continueMigration()
        while true {
            // Completed means that the destination has said so on the return path; nothing else does.
            let state = try await monitor.migrationState()
            if state.status == "completed" { break }
            if state.status == "failed" || state.status == "cancelled" {
                throw MigrationError(.failed, "QEMU could not finish the migration: \(state.error ?? state.status)")
            }
            try await wait(.milliseconds(5))
        }
        // The run state follows a moment after the migration's state.
        while true {
            let status = try await monitor.status()
            if status == "postmigrate" { break }
            guard ["finish-migrate", "paused"].contains(status) else {
                throw MigrationError(.failed, "QEMU is in the state '\(status)' after the migration, not 'postmigrate'")
            }
            try await wait(.milliseconds(2))
        }
        if plan.verifiesFully {
            for disk in disks {
                guard let digest = await digest(of: disk, at: disk.path) else {
                    throw MigrationError(.failed, "The image \(disk.path) cannot be read for --verify=full")
                }
                fullDigests[disk.offer.name] = digest
                if let fault { throw fault }
            }
        }
        // First the images are out of reach of whatever might start the guest on its own, and QEMU still has what it sent.
        fence()
        guard try await monitor.status() == "postmigrate" else {
            throw MigrationError(.failed, "QEMU left the state 'postmigrate' before the guest was released")
        }
        if let fault { throw fault }
        do {
            try journal.append(.released)
        } catch let error as JournalError {
            isInDoubt = error.kind == .doubtful
            throw MigrationError(.failed, "\(error)")
        }
        isReleased = true
        watchdog?.guestIsReleased()
    }
}
