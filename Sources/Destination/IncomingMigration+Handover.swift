internal import Emulator
internal import Glibc
internal import IO
internal import Migration
internal import TLS

extension IncomingMigration {
    // MARK: PREPARED

    /// Reads back what is written, again and again, so that little is left for later.
    func settle() {
        maySettle = true
        guard settling == nil else { return }
        settleTimer?.cancel()
        settleTimer = agent.loop.schedule(after: .milliseconds(isMemoryDue ? 250 : 500)) {
            guard self.maySettle, self.settling == nil, self.state == .offered, let images = self.images else { return }
            guard images.isStale else { return self.settle() }
            self.settling = Task(executorPreference: self.agent.loop) {
                try? await images.updateDigests(self.isMemoryDue ? .running : .copying)
                self.settling = nil
                if self.maySettle { self.settle() }
            }
        }
    }

    /// Ends the passes in the background: another one is due.
    func endSettling() async {
        maySettle = false
        settleTimer?.cancel()
        guard let settling else { return }
        images?.interruptPass(true)
        await settling.value
        images?.interruptPass(false)
    }

    func prepare(_ prepared: Message.Prepared) async throws {
        guard state == .offered, let images, let journal else { return }
        // A journal is written only for what is still wanted.
        func check() throws { if state != .offered { throw GuestError("The migration was given up meanwhile") } }
        guard monitor?.isConnected == true, record?.process?.isRunning == true else {
            throw GuestError("QEMU does not run any more")
        }
        await endSettling()
        await images.closeExports()
        try await images.flush()
        proofs = prepared.proofs
        isFull = prepared.isFull
        // For an agent that takes this one's place. A host that falls takes QEMU with it, and then nothing is compared.
        try? saveProofs()
        try check()
        try journal.append(.prepared)
        state = .prepared
        secrets = [:]
        if isFull { images.markAll() }
        takeFinalDigests(images)
    }

    /// The last digests are taken while the source sends the rest of the memory.
    func takeFinalDigests(_ images: IncomingImages) {
        finalDigests = Task(executorPreference: agent.loop) { try await images.updateDigests(.paused) }
    }

    var proofsFile: String { files.proofs }

    private func saveProofs() throws {
        let bytes = try JSONText.encode(Message.Prepared(proofs: proofs, isFull: isFull))
        let fd = Glibc.open(proofsFile, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o600)
        guard fd >= 0 else { throw ChannelError.system("create \(proofsFile)", errno) }
        defer { close(fd) }
        try DurableFile.append(bytes, to: fd, path: proofsFile)
    }

    /// Gives a migration up that the source may have released, or may release yet: it will never run here, durably.
    func refuse(_ reason: String) async throws {
        guard journal != nil else { throw GuestError("The journal of this migration is not open") }
        try makeRefusalDurable(reason)
        await giveUp(reason)
    }

    /// A source that hears ABORT counts on it.
    func makeRefusalDurable(_ reason: String) throws {
        guard refusal == nil, let journal else { return }
        try journal.append(.rolledBack(reason: reason))
        refusal = reason
    }

    func own(_ release: Message.Release = .init()) async throws {
        guard let journal, let offer else {
            throw ChannelError(.protocolViolation, "RELEASE for a migration that is not there")
        }
        if state == .prepared {
            // A record that may be found later must not be contradicted: then it can only be written again.
            if !isOwnerInDoubt, let reason = try await flaw(release) {
                // The guest is whole where it came from, and nothing has happened here.
                log(.error, "Migration \(id): guest '\(offer.guest)' is refused: \(reason)")
                try await refuse(reason)
                throw Refusal(reasons: [reason])
            }
            try decide(journal, .owner(digests: ownedDigests))
            log(.info, "Migration \(id): this host owns guest '\(offer.guest)' now")
        }
        try await resumeGuest()
        await takeOwnedDigests()
    }

    /// Nothing depends on the digests but the report, so the guest does not wait for those of a large disk.
    private func takeOwnedDigests() async {
        guard ownedDigests.isEmpty, let digests = try? await images?.digests(), !digests.isEmpty else { return }
        ownedDigests = digests
        try? journal?.append(.digests(digests))
    }

    private func decide(_ journal: Journal, _ record: JournalRecord) throws {
        do {
            try journal.append(record)
        } catch let error as JournalError {
            if error.kind == .doubtful { isOwnerInDoubt = true }
            throw error
        }
        state = .owner
    }

    /// An operator says that the source will never run the guest: it belongs here, if it is here.
    func take(by operatorName: String) async throws -> String {
        await order.acquire()
        defer { order.release() }
        guard state == .prepared, let journal, let offer else {
            throw GuestError("Migration \(id) is in the state '\(state.rawValue)': there is nothing to decide here")
        }
        if let reason = try await flaw(.init()) { throw GuestError("The guest cannot run here: \(reason)") }
        try decide(journal, .taken(by: operatorName))
        log(.warning, "Migration \(id): \(operatorName) has taken guest '\(offer.guest)' for this host")
        try await resumeGuest()
        await takeOwnedDigests()
        if connections.isEmpty { finish() }
        return offer.guest
    }

    /// What is wrong with the guest as it is here; nil when it may run.
    private func flaw(_ release: Message.Release) async throws -> String? {
        guard let offer, let process = record?.process, process.isRunning else {
            return "QEMU of the guest has ended on the destination"
        }
        do {
            try await waitUntilLoaded(try await connectMonitor())
        } catch let error where !process.isRunning {
            let words = EmulatorProcess.tail(of: agent.guests.log(of: offer.guest))
            return "QEMU of the guest has ended on the destination: \(words.isEmpty ? "\(error)" : words)"
        }
        guard let finalDigests, let images else { return nil }
        do {
            try await finalDigests.value
            if !release.digests.isEmpty { ownedDigests = try await images.digests() }
        } catch { return "The images on the destination cannot be read back: \(error)" }
        var wrong = await images.mismatches(proofs)
        for (name, digest) in release.digests where ownedDigests[name] != digest { wrong.append(name) }
        guard !wrong.isEmpty else { return nil }
        let names = Set(wrong).sorted().joined(separator: ", ")
        return
            "What the destination has of \(names) is not what the source sent: it was damaged on the way or on the disk"
    }

    func connectMonitor() async throws -> QMPClient {
        if let monitor, monitor.isConnected { return monitor }
        // An earlier agent was connected, or the connection broke; QEMU has outlived it.
        guard let record else { throw GuestError("The record of the guest is gone") }
        let monitor = try await QMPClient.connect(to: agent.guests.agentMonitor(of: record), on: agent.loop)
        self.monitor = monitor
        return monitor
    }

    private func resumeGuest() async throws {
        guard var record else { throw ChannelError(.protocolViolation, "RELEASE for a guest that is not there") }
        let monitor = try await connectMonitor()
        await images?.release()
        try await run(monitor)
        if !runsHere { resumedAt = .now }
        runsHere = true
        record.released = nil
        try agent.guests.save(record)
        self.record = record
    }

    /// QEMU must have the whole guest before it may run.
    private func waitUntilLoaded(_ monitor: QMPClient) async throws {
        for _ in 0..<3000 {
            let state = try await monitor.migrationState()
            let status = try await monitor.status()
            if state.status == "completed", status == "paused" { return }
            if status == "running" { throw GuestError("The guest runs before it was released; this must not happen") }
            await agent.loop.sleep(for: .milliseconds(5))
        }
        throw GuestError("QEMU did not finish loading the guest within 15 s")
    }

    /// Resumes the guest. It belongs to this side whatever happens here, so a failure is repeated, not rolled back.
    func run(_ monitor: QMPClient) async throws {
        var attempt = 0
        while true {
            do {
                if try await monitor.status() != "running" { try await monitor.resume() }
                _ = try? await monitor.execute(
                    "announce-self",
                    ["initial": 50, "max": 550, "rounds": 5, "step": 50]
                )
                return
            } catch let error as QMPError where error.code == .refused {
                attempt += 1
                log(.error, "Migration \(id): the guest belongs to this host, but QEMU does not resume it: \(error)")
                if attempt >= 20 { throw error }
                await agent.loop.sleep(for: .milliseconds(100 * attempt))
            }
        }
    }

    /// The guest belongs here, and QEMU could not be made to run it: that does not change who owns it.
    func tryAgain() {
        Task(executorPreference: agent.loop) {
            await self.agent.loop.sleep(for: .seconds(5))
            await self.order.acquire()
            defer { self.order.release() }
            guard self.state == .owner else { return }
            do {
                try await self.own()
                if self.connections.isEmpty { self.finish() }
            } catch {
                self.log(.error, "Migration \(self.id): the guest belongs to this host and does not run: \(error)")
                if self.record?.process?.isRunning == true {
                    self.tryAgain()
                } else {
                    // Nothing can be resumed; the images are complete and the guest may be started here.
                    self.finish()
                }
            }
        }
    }

    /// The guest runs here. Whether the source knows is its own affair: it may ask again, and the journal answers.
    func finish() {
        guard state == .owner else { return }
        state = .done
        unlink(files.incoming)
        unlink(proofsFile)
        unlink(incomingSocket)
        monitor?.close()
        monitor = nil
        images = nil
        guestLock = nil
    }
}
