internal import Emulator
internal import Glibc
internal import IO
internal import Migration
internal import TLS

extension IncomingMigration {
    func carryOut(_ step: DestinationHandover.Step, _ connection: MessageConnection?) async
        -> DestinationHandover.Event
    {
        do {
            switch step {
            case .begin: try await begin()
            case .judge:
                guard let offer else { throw GuestError("There is no offer") }
                try await holdings.awaitBlankCopy()
                let obstacles = await check(offer)
                if !obstacles.isEmpty { throw Refusal(obstacles: obstacles) }
                sketch = try await startShadow(offer)
            case .build: try await build(connection)
            case .mirror:
                try await readBack()
                await awaitBridges()
            case .listen:
                // An agent that took the place of another one begins here.
                disks?.expectMemory()
                try await guest?.listen()
                // Its first words here are not to be lost.
                if let guest, guest.record?.placement?.console != nil {
                    await agent.configuration.expectConsole?(guest.name)
                }
            case .settle:
                guard guest?.isRunning == true else { throw GuestError(guest?.refusal ?? "QEMU does not run any more") }
                try await disks?.complete(prepared)
            case .examine(let claim): return try await examine(claim)
            case .note: try await save(isReady: true, runState: guest?.standsAs, isOff: guest?.isOff ?? false)
            case .takeUp: return try await readJournal()
            case .reopen: try await reopen()
            case .adopt:
                try adopt(isWhole: true)
                try disks?.loadProofs()
                log(.warning, "Migration \(id): waiting for the source's word on guest '\(offer?.guest ?? "")'")
            }
            return .carriedOut(step)
        } catch let error as ChannelError where error.code == .closed || error.code == .truncated {
            return .failed("\(error)")
        } catch {
            guard [.begin, .judge, .build].contains(step) else {
                if step == .takeUp || step == .adopt { await letGo("\(error)") }
                return .failed("\(error)")
            }
            obstacles = (error as? Refusal)?.obstacles ?? [Obstacle(.rehearsal, "\(error)")]
            let reasons = obstacles.map(\.reason)
            let name = offer?.guest ?? ""
            log(.warning, "Migration \(id): refused guest '\(name)': \(reasons.joined(separator: "; "))")
            return .refused(reasons)
        }
    }

    private func begin() async throws {
        guard let offer else { throw GuestError("There is no offer") }
        try holdings.countGuest()
        try offered(offer).judge()
        if let refusal = await agent.cordonRefusal() { throw GuestError(refusal) }
        await agent.endAbsences(of: peer, guest: offer.guest, but: id)
        guard let lock = try agent.migrations.lock(guest: offer.guest) else {
            let isFromHere = DurableFile.exists(agent.migrations.files(of: id).plan)
            throw GuestError(
                isFromHere
                    ? "Guest '\(offer.guest)' is on this very host already: source and destination are the same, with the state directory "
                        + agent.configuration.stateDirectory
                    : "Guest '\(offer.guest)' is being migrated on this host already"
            )
        }
        guestLock = lock
        // Sources decide how many journals there are.
        try await BlockingPool.shared.run { try self.checkJournals(of: offer.guest) }
        if offer.isRehearsal { return }
        guard !DurableFile.exists(files.journal) else {
            throw GuestError("The migration \(id) has been here before")
        }
        let (files, migrations, source) = (files, agent.migrations, peer.name)
        journal = try await BlockingPool.shared.run {
            try DurableFile.makeDirectory(files.directory)
            let journal = try Journal(creating: files.journal)
            try journal.append(.accepted(guest: offer.guest, source: source, order: migrations.nextOrder()))
            migrations.forgetRefused(of: source, keeping: PeerLimits.refusedMigrations - 1)
            return journal
        }
    }

    /// The rehearsal is over: what it showed decides whether anything is made.
    private func build(_ connection: MessageConnection?) async throws {
        guard let offer else { throw GuestError("There is no offer") }
        let reason = await endShadow()
        holdings.endBlankCopy()
        if let reason { throw Refusal(obstacles: [.init(.machine, reason)]) }
        if offer.isRehearsal { return }
        guard let connection else { throw ChannelError(.closed, "The connection to the source was lost") }
        policy = try await agent.makePolicy()
        // Before anything is made: a later agent finds here what it has to clean up.
        try await save(isReady: false)
        let found = try await findFiles(offer, connection)
        keptBacking = try await findKeptBacking(offer, rehearsed)
        try await findOldImages(offer, connection)
        try checkRoom(offer)
        // Before an old image gets another name.
        if !oldImages.isEmpty { try await save(isReady: false) }
        let disks = makeDisks(offer)
        self.disks = disks
        try await makeImages(offer, disks, files: found, secrets.values)
        let record = try await makeRecord(offer, files: found, secrets.values)
        let guest = makeGuest(offer)
        self.guest = guest
        guest.keep(secrets.values)
        secrets = OfferedSecrets()
        try await guest.start(record)
        try await save(isReady: true)
        disks.settle()
        log(.info, "Migration \(id): receiving guest '\(offer.guest)' from \(peer.name)")
    }

    private func makeDisks(_ offer: Message.Offer) -> IncomingDisks {
        let images = IncomingImages(
            directory: imageDirectory(offer),
            generation: agent.generation,
            exports: agent.exports,
            loops: agent.dataLoops,
            policy: policy ?? agent.configuration.confinement,
            log: log
        )
        for disk in offer.disks {
            guard let image = oldImages[disk.name] else { continue }
            images.remember(placed(image, of: disk, offer), for: disk.name)
        }
        return IncomingDisks(images, proofsFile: files.proofs, on: agent.loop)
    }

    private func makeGuest(_ offer: Message.Offer) -> IncomingGuest {
        let guest = IncomingGuest(offer.guest, hasUUID: offer.hasUUID, agent.guests, on: agent.loop) {
            [id, log] level, text in log(level, "Migration \(id): \(text)")
        }
        guest.onEnd = { [weak self] reason, isCut in
            guard let self else { return }
            Task(executorPreference: self.agent.loop) {
                await self.exclusively {
                    // A guest that belongs to this host is not lost with the monitor.
                    if case .owner = self.handover.state, self.guest?.isRunning == true { return }
                    await self.perform(.emulatorEnded(reason, isCut: isCut))
                }
            }
        }
        return guest
    }

    /// Looks whether the guest may run here: QEMU has all of it, in the state in which it left, and its disks are what was sent.
    private func examine(_ claim: DestinationHandover.Claim) async throws -> DestinationHandover.Event {
        guard let guest, let disks else { throw GuestError("The guest is not here") }
        var expected: [String: String] = [:]
        let states: Set<RunState>
        var standsAs = guest.standsAs
        switch claim {
        case .release(let release):
            expected = release.digests
            let state = release.runState ?? .running
            if case .stays(let reason) = state.verdict {
                return .flawed("The guest cannot be owned in the state '\(state.rawValue)': \(reason)")
            }
            states = state.arrivals
            keep(release.lineages)
            standsAs = state.verdict == .stands ? state : nil
            guest.isOff = release.isOff == true && state == .prelaunch
        case .taken:
            // How it left is not known, and what arrives as itself did not run.
            states = [.paused, .ioError, .suspended, .panicked, .watchdog, .prelaunch]
        }
        switch try await guest.look(for: states) {
        case .flawed(let reason): return .flawed(reason)
        case .loaded(let state):
            if case .taken = claim, [.panicked, .watchdog, .prelaunch].contains(state) { standsAs = state }
        }
        if let reason = await disks.flaw(expected) { return .flawed(reason) }
        // Reading the disks takes time, in which somebody else may have started the guest.
        if case .flawed(let reason) = try await guest.look(for: states) { return .flawed(reason) }
        guest.standsAs = standsAs
        return .sound(digests: disks.ownedDigests, stands: standsAs != nil)
    }

    /// Keeps what old images of the disks elsewhere are known by. The record of the guest has it once the guest is admitted.
    private func keep(_ known: [String: [Lineage]]?) {
        guard let known, let offer else { return }
        let names = Set(offer.disks.map(\.name))
        lineages = known.filter { names.contains($0.key) }.mapValues { Array($0.suffix(Lineage.most)) }
    }

    func admit() async -> DestinationHandover.Event {
        guard let guest else { return .notResumed("The guest is not here") }
        do {
            guard guest.isRunning else {
                log(
                    .warning,
                    "Guest '\(guest.name)' belongs to this host and does not run; use 'crossdock guest start'"
                )
                return .emulatorEnded("QEMU has ended", isCut: false)
            }
            await disks?.images.release()
            if let offer {
                let known = offer.disks.compactMap { disk in
                    lineages[disk.name].map {
                        (DurableFile.resolve(imagePath(disk, offer), in: "/"), $0.map(\.text))
                    }
                }
                guest.keep(lineages: Dictionary(known) { first, _ in first })
            }
            try await guest.admit()
            // Where it once went from here counts no more.
            ConsoleDeparture.remove(guest.name, stateDirectory: agent.configuration.stateDirectory)
            return .resumed
        } catch {
            log(.error, "Migration \(id): the guest belongs to this host and does not run: \(error)")
            guard guest.isRunning else { return .emulatorEnded("\(error)", isCut: false) }
            return .notResumed(
                "The guest belongs to this host and does not run: \(error). Once what QEMU complains of is settled there, it goes on by "
                    + "itself; 'crossdock guest stop \(guest.name) --force' there gives its memory up, and 'crossdock guest start "
                    + "\(guest.name)' starts it anew"
            )
        }
    }

    // MARK: - After a restart

    /// Reads what an earlier agent has decided, and makes it durable: who acts on a journal must not act on what a crash takes away.
    private func readJournal() async throws -> DestinationHandover.Event {
        guard let offer, let saved = Self.saved(files) else { throw GuestError("The offer is gone") }
        guard try !agent.migrations.isSuperseded(id, of: offer.guest) else {
            // A later migration has decided about this guest.
            unlink(files.incoming)
            return .superseded
        }
        guard let lock = try agent.migrations.lock(guest: offer.guest) else {
            throw GuestError("Guest '\(offer.guest)' is locked by another process")
        }
        guestLock = lock
        let path = files.journal
        journal = try await BlockingPool.shared.run { try Journal(opening: path) }
        guard case .destination(let standing) = try agent.migrations.reading(of: id)?.standing else {
            throw GuestError("The journal \(path) does not say where the migration stands")
        }
        let guest = makeGuest(offer)
        try guest.takeUp(hasListened: true)
        guest.standsAs = saved.runState
        guest.isOff = saved.isOff ?? false
        self.guest = guest
        policy = guest.record?.confinement?.policy
        switch standing {
        case .accepted, .prepared:
            guard let arrival = guest.record?.arrival else { break }
            agent.ledger.begin(id, guest: offer.guest, arrival)
        default: break
        }
        disks = makeDisks(offer)
        disks?.ownedDigests = standing.ownerDigests ?? [:]
        return .restarted(standing, wasReady: saved.isReady ?? false)
    }

    /// A disk that is full may be emptied; until then nobody is told that there is no such migration.
    private func letGo(_ reason: String) async {
        log(.error, "Migration \(id): cannot be taken up: \(reason)")
        (journal, guestLock) = (nil, nil)
        await disks?.images.forget()
    }

    /// Exports the images of an earlier agent again, so that the source can go on. QEMU is started when it is needed.
    private func reopen() async throws {
        guard let offer, let disks else { return }
        let kept = guest?.record?.confinement?.files
        do {
            for disk in offer.disks {
                try await disks.images.reopen(
                    disk,
                    at: imagePath(disk, offer),
                    export: exportName(disk),
                    keeping: kept,
                    for: peer.name
                )
            }
        } catch {
            await disks.images.forget()
            throw error
        }
        await guest?.tryToConnect()
        disks.settle()
    }

    /// Opens the images that an earlier agent has made.
    private func adopt(isWhole: Bool) throws {
        guard let offer, let disks else { return }
        for disk in offer.disks where isWhole || DurableFile.exists(imagePath(disk, offer)) {
            do { try disks.images.adopt(disk, at: imagePath(disk, offer), export: exportName(disk)) } catch {
                if isWhole { throw error }
            }
        }
    }

    // MARK: - The end

    /// Leaves nothing behind of a guest that stays where it is.
    func cleanUp(_ reason: String) async {
        absence?.cancel()
        secrets = OfferedSecrets()
        let shadow = shadow
        self.shadow = nil
        await shadow?.stop()
        holdings.endBlankCopy()
        // Without the lock nothing here is this migration's.
        if let offer, journal != nil, guestLock != nil {
            await guest?.remove(restoring: previous)
            refusal = guest?.refusal
            if disks?.images.images.isEmpty == true { try? adopt(isWhole: false) }
            // Of files only those that came with this migration.
            let store = fileStore(offer)
            DurableFile.remove(store)
            rmdir(String(store.dropLast(id.utf8.count + 1)))
            await disks?.delete()
            rmdir(imageDirectory(offer))
            unlink(files.incoming)
            log(.info, "Migration \(id): gave up guest '\(offer.guest)': \(reason)")
        }
        (guest, disks, guestLock) = (nil, nil, nil)
    }

    /// The guest belongs here. Whether the source knows is its own affair: it may ask again, and the journal answers.
    func finish() {
        absence?.cancel()
        agent.ledger.settle(id)
        ownedDigests = disks?.ownedDigests ?? ownedDigests
        unlink(files.incoming)
        unlink(files.proofs)
        guest?.release()
        (disks, guestLock) = (nil, nil)
    }
}
