internal import Emulator
internal import IO
internal import Migration
internal import TLS

extension IncomingMigration {
    /// What a later agent needs to take this migration up.
    struct Saved: Codable, Sendable {
        var peer: TLSPeer
        var offer: Message.Offer
        /// What this host knew of a guest of the same name, which had left it earlier.
        var previous: GuestRecord?
        /// Whether READY was said: a source that was lost may come back and go on.
        var isReady: Bool?
        /// How the guest stands still, if it does; noted before it belongs to this host.
        var runState: RunState?
        /// Whether it is off.
        var isOff: Bool?
        /// The old images that disks are begun with, by the disk's name.
        var oldImages: [String: OldImage]?
    }

    /// A migration that ended here may be asked for again by a source that did not hear OWNED: the journal answers.
    static func open(_ id: String, peer: TLSPeer, agent: DestinationAgent) -> IncomingMigration {
        guard let reading = try? agent.migrations.reading(of: id), reading.peer == peer.name,
            case .destination(let standing) = reading.standing
        else { return IncomingMigration(id, peer: peer, agent: agent, DestinationHandover()) }
        let state: DestinationHandover.State =
            switch standing {
            case .owner: .done(takenBy: nil, isSettled: reading.isSettled)
            case .taken(let by, _): .done(takenBy: by, isSettled: reading.isSettled)
            case .rolledBack(let reason): .aborted(reason: reason, .durable)
            case .overruled(let by): .overruled(by: by, wasOwner: reading.wasOwned)
            case .accepted, .prepared: .new
            }
        let migration = IncomingMigration(id, peer: peer, agent: agent, DestinationHandover(state))
        migration.ownedDigests = standing.ownerDigests ?? [:]
        return migration
    }

    /// One that an earlier agent has left; nil when there is nothing to take up.
    static func left(_ id: String, agent: DestinationAgent) -> IncomingMigration? {
        guard let saved = saved(agent.migrations.files(of: id)) else { return nil }
        let migration = IncomingMigration(id, peer: saved.peer, agent: agent, DestinationHandover(.stuck))
        migration.offer = saved.offer
        migration.previous = saved.previous
        migration.oldImages = saved.oldImages ?? [:]
        return migration
    }

    static func saved(_ files: MigrationFiles) -> Saved? {
        guard let bytes = try? DurableFile.read(files.incoming) else { return nil }
        return JSONText.decode(Saved.self, from: bytes)
    }

    func append(_ record: JournalRecord) async -> DestinationHandover.Event {
        do {
            if journal == nil {
                let path = files.journal
                journal = try await BlockingPool.shared.run { try Journal(opening: path) }
            }
            guard let journal else { return .notWritten("The journal of this migration is not open") }
            try await journal.write(record)
        } catch let error as JournalError {
            return error.kind == .doubtful ? .doubtful("\(error)") : .notWritten("\(error)")
        } catch { return .notWritten("\(error)") }
        switch record {
        case .owner: log(.info, "Migration \(id): this host owns guest '\(offer?.guest ?? "")' now")
        case .taken(let by):
            log(.warning, "Migration \(id): \(by) has taken guest '\(offer?.guest ?? "")' for this host")
        default: break
        }
        return .durable
    }

    /// Notes durably what a later agent needs.
    func save(isReady: Bool, runState: RunState? = nil, isOff: Bool = false) async throws {
        guard let offer else { return }
        var saved = Saved(peer: peer, offer: offer, previous: previous, isReady: isReady, runState: runState)
        if isOff { saved.isOff = true }
        if !oldImages.isEmpty { saved.oldImages = oldImages }
        let path = files.incoming
        try await BlockingPool.shared.run { [saved] in try DurableFile.write(try JSONText.encode(saved), to: path) }
    }
}
