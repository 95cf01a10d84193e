internal import Emulator
internal import Glibc
internal import IO
internal import Migration
internal import TLS

extension IncomingMigration {
    static func restore(_ id: String, agent: DestinationAgent) -> IncomingMigration? {
        let path = agent.migrations.files(of: id).incoming
        guard let bytes = try? DurableFile.read(path),
            let saved = JSONText.decode(Saved.self, from: bytes)
        else { return nil }
        let migration = IncomingMigration(id, peer: saved.peer, agent: agent)
        migration.offer = saved.offer
        migration.previous = saved.previous
        migration.isReady = saved.isReady ?? false
        migration.hasStarted = true
        return migration
    }

    /// Decides from the journal alone: nothing durable means that the source still owns the guest.
    func resume(_ standing: DestinationStanding) async {
        guard let offer else { return }
        do {
            guard try !agent.migrations.isSuperseded(id, of: offer.guest) else {
                // A later migration has decided about this guest.
                unlink(files.incoming)
                return
            }
            guard let lock = try agent.migrations.lock(guest: offer.guest) else {
                log(.error, "Migration \(id): guest '\(offer.guest)' is locked by another process")
                return
            }
            guestLock = lock
            journal = try Journal(opening: agent.migrations.journal(of: id))
            record = try agent.guests.load(offer.guest)
            let images = makeImages(offer)
            self.images = images
            switch standing {
            case .owner(let digests), .taken(_, let digests):
                state = .owner
                ownedDigests = digests
                if record?.process?.isRunning == true {
                    try await own()
                    log(.info, "Migration \(id): took up guest '\(offer.guest)', which belongs to this host")
                } else {
                    log(
                        .warning,
                        "Guest '\(offer.guest)' belongs to this host and does not run; use 'crossdock guest start'"
                    )
                }
                finish()
            case .prepared:
                state = .prepared
                for disk in offer.disks {
                    try images.adopt(disk, at: imagePath(disk, offer), export: exportName(disk))
                }
                if let bytes = try DurableFile.read(proofsFile),
                    let saved = JSONText.decode(Message.Prepared.self, from: bytes)
                {
                    (proofs, isFull) = (saved.proofs, saved.isFull)
                }
                takeFinalDigests(images)
                log(.warning, "Migration \(id): waiting for the source's word on guest '\(offer.guest)'")
            case .accepted, .rolledBack, .overruled:
                state = .offered
                if isReady, standing == .accepted, await reopen(offer, images) {
                    waitForSource()
                    return
                }
                for disk in offer.disks where DurableFile.exists(imagePath(disk, offer)) {
                    try? images.adopt(disk, at: imagePath(disk, offer), export: exportName(disk))
                }
                if case .rolledBack(let reason) = standing { refusal = reason }
                if case .overruled(let by) = standing { refusal = "\(by) has taken the guest for its source" }
                await giveUp("The destination agent ended before the guest was released")
            }
        } catch {
            log(.error, "Migration \(id): cannot be taken up: \(error)")
            if state == .owner { return tryAgain() }
            // A disk that is full may be emptied; until then nobody is told that there is no such migration.
            isStuck = true
            Task(executorPreference: agent.loop) {
                await self.agent.loop.sleep(for: .seconds(5))
                guard case .destination(let standing) = (try? self.agent.migrations.reading(of: self.id))?.standing
                else {
                    return
                }
                self.isStuck = false
                (self.journal, self.guestLock) = (nil, nil)
                await self.images?.forget()
                await self.resume(standing)
            }
        }
    }

    /// Exports the images of an earlier agent again, so that the source can go on. QEMU is started when it is needed.
    private func reopen(_ offer: Message.Offer, _ images: IncomingImages) async -> Bool {
        do {
            for disk in offer.disks {
                try await images.reopen(disk, at: imagePath(disk, offer), export: exportName(disk), for: peer.name)
            }
            if let record, record.process?.isRunning == true { _ = try? await connectMonitor() }
            // Whether it has taken a part of a stream is not known.
            hasListened = true
            settle()
            return true
        } catch {
            log(.warning, "Migration \(id): cannot go on: \(error)")
            await images.forget()
            return false
        }
    }
}
