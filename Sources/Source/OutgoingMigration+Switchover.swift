internal import Emulator
internal import IO
internal import Migration

/// The guest is paused: every step until it may be released, and the bound of the pause.
extension OutgoingMigration {
    // MARK: The switchover

    func endMirrors() async throws -> SourceHandover.Event {
        let (monitor, _, _) = try guest()
        // The loss was noticed when the guest was paused already.
        if mirrors.isAway { memory.lose(mirrors.absence) }
        try context.check()
        try await mirrors.end(monitor)
        try await checkDescription(.drives)
        return .mirrorsEnded
    }

    func ask() async throws -> SourceHandover.Event {
        let (monitor, _, watch) = try guest()
        resumesAtCompletion = watch.resumes
        // What QEMU sends travels beside the question and its answer: neither waits for the other, the release waits for both.
        try await memory.proceed(monitor)
        let question = Message.prepared(.init(proofs: try await mirrors.proofs(), isFull: plan.verifiesFully))
        let answer = try await link.ask(question, timeout: .milliseconds(plan.blackoutDeadline))
        guard case .prepared = answer else { throw link.unexpected(answer, to: question) }
        return .prepared
    }

    func complete() async throws -> SourceHandover.Event {
        let (monitor, _, _) = try guest()
        async let users = others()
        try await memory.complete(monitor)
        if plan.verifiesFully {
            for disk in mirrors.disks {
                guard let digest = await disk.digest(at: disk.path, data: disk.dataPath, on: context.dataLoops) else {
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
    func raiseFence() async throws -> SourceHandover.Event {
        guard let fence else { return .fenced }
        try await BlockingPool.shared.run { try fence.raise() }
        return .fenced
    }

    /// Other clients of QEMU can say `cont` at any moment, and QEMU obeys.
    func freeze() async throws -> SourceHandover.Event {
        let (monitor, record, _) = try guest()
        guard try await monitor.runState() == .postmigrate else {
            throw MigrationError(.failed, "QEMU left the state 'postmigrate' before the guest was released")
        }
        // Until it is frozen a disc can be changed; with its migration over, QEMU takes and gives devices again.
        try await compareDescription(.everything)
        guard let process = record.process else { throw MigrationError(.failed, "QEMU's process is not known") }
        guard try await BlockingPool.shared.run({ try process.freeze() }) else {
            throw MigrationError(.failed, "Somebody else has stopped QEMU (process \(process.pid)) with a signal")
        }
        return .frozen
    }

    /// What QEMU has said until it was frozen.
    func look() async throws -> SourceHandover.Event {
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

    func writeReleased() async throws -> SourceHandover.Event {
        do { try await journal?.write(.released) } catch let error as JournalError {
            let reason = MigrationError(.failed, "\(error)")
            if error.kind == .doubtful { return .doubtful(reason) }
            throw reason
        }
        watchdog?.guestIsReleased()
        return .written
    }

    // MARK: The pause

    /// How long the copies of other guests yield to a pause at most, in milliseconds: their guests' writes wait, too.
    private static let yielding = 1000

    /// The guest is paused by the migration: from here on the blackout has a bound, whatever QEMU or the network wait for.
    func paused(since instant: ContinuousClock.Instant?) {
        deadline?.cancel()
        if instant == nil { context.beacon?.lower() } else { context.beacon?.raise(for: Self.yielding) }
        keepConsoleStill(instant != nil)
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
    func startWatchdog(_ monitor: QMPClient) throws {
        if let watchdog {
            if watchdog.isAlive { return }
            watchdog.dismiss()
            context.warn("The watchdog of this migration has ended; starting another one")
        }
        try startWatchdog(monitor, number: 0)
    }

    private func startWatchdog(_ monitor: QMPClient, number: Int) throws {
        let next = try SwitchoverWatchdog(plan, monitor: monitor.descriptor, beating: context.loop, number: number)
        next.onEnd = { [weak self, unowned next] in self?.hasEnded(next, monitor) }
        watchdog = next
    }

    /// How often another one is started.
    private static let mostWatchdogs = 4

    /// Somebody has killed it: nobody would look after the guest if this agent died, too.
    private func hasEnded(_ last: SwitchoverWatchdog, _ monitor: QMPClient) {
        guard handover.mayBeInterrupted, last === watchdog else { return }
        last.dismiss()
        guard last.number + 1 < Self.mostWatchdogs else {
            return context.warn(
                "The watchdog of this migration has ended for the \(Self.mostWatchdogs)th time; there is none now"
            )
        }
        context.warn("The watchdog of this migration has ended; starting another one")
        do {
            try startWatchdog(monitor, number: last.number + 1)
            if let since = watch?.stoppedAt { watchdog?.guestStopped(at: since) }
        } catch { context.warn("It could not be started: \(error)") }
    }
}
