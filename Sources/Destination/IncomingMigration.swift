internal import Emulator
internal import Glibc
internal import IO
internal import Migration
internal import TLS

/// One migration, seen from the destination: carries out what `DestinationHandover` decides.
///
/// One event at a time, with all that follows from it: a message, a timer and the operator wait for each other.
final class IncomingMigration: @unchecked Sendable {
    // Unchecked: confined to the agent's control loop.

    /// What a later agent needs to take this migration up.
    struct Saved: Codable {
        var peer: TLSPeer
        var offer: Message.Offer
        /// What this host knew of a guest of the same name, which had left it earlier.
        var previous: GuestRecord?
        /// Whether READY was said: a source that was lost may come back and go on.
        var isReady: Bool?
        /// How the guest stands still, if it does; noted before it belongs to this host.
        var runState: RunState?
    }

    struct Refusal: Error { let reasons: [String] }

    let id: String
    let peer: TLSPeer
    unowned let agent: DestinationAgent
    private(set) var handover: DestinationHandover
    let conversation = Conversation()
    var offer: Message.Offer?
    var disks: IncomingDisks?
    var guest: IncomingGuest?
    /// What this host knew of a guest of the same name, which had left it earlier.
    var previous: GuestRecord?
    var journal: Journal?
    var guestLock: FileLock?
    /// Receives the files of the guest that this host does not have.
    var receiver: FileReceiver?
    /// The blank copy of the guest, while its move is rehearsed.
    var shadow: ShadowEmulator?
    /// What the source says of the images that it keeps, and of the disks.
    var rehearsed = Message.Rehearsed()
    var prepared = Message.Prepared()
    /// The values of the guest's secrets until QEMU is started; never on a disk.
    var secrets: [String: SecretBytes] = [:]
    /// The disks whose backing images are here.
    var keptBacking: Set<String> = []
    /// How the guest is confined; nil before anything of it is made.
    var policy: ConfinementPolicy?
    /// What the blank copy is.
    var sketch: Message.Shadow?
    /// What the journal says of the disks of a guest that came earlier.
    var ownedDigests: [String: String] = [:]
    private let order = AsyncLock()
    /// Ends the wait for a source that was lost.
    var absence: LoopTimer?

    private init(_ id: String, peer: TLSPeer, agent: DestinationAgent, _ handover: DestinationHandover) {
        self.id = id
        self.peer = peer
        self.agent = agent
        self.handover = handover
    }

    /// A migration that ended here may be asked for again by a source that did not hear OWNED: the journal answers.
    static func open(_ id: String, peer: TLSPeer, agent: DestinationAgent) -> IncomingMigration {
        guard let reading = try? agent.migrations.reading(of: id), reading.peer == peer.name,
            case .destination(let standing) = reading.standing
        else { return IncomingMigration(id, peer: peer, agent: agent, DestinationHandover()) }
        let state: DestinationHandover.State =
            switch standing {
            case .owner: .done(takenBy: nil)
            case .taken(let by, _): .done(takenBy: by)
            case .rolledBack(let reason): .aborted(reason: reason, .durable)
            case .overruled(let by): .overruled(by: by)
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
        return migration
    }

    static func saved(_ files: MigrationFiles) -> Saved? {
        guard let bytes = try? DurableFile.read(files.incoming) else { return nil }
        return JSONText.decode(Saved.self, from: bytes)
    }

    var files: MigrationFiles { agent.migrations.files(of: id) }
    var log: Log { agent.log }

    // MARK: - The conversation

    func serve(_ connection: MessageConnection, _ features: Set<Feature>) async {
        conversation.begin(connection, features)
        for action in handover.handle(.connected) where action == .stopWaiting { absence?.cancel() }
        var failure: (any Error)?
        do {
            try await connection.send(
                .welcome(.init(state: handover.onWire, nbdPort: agent.nbdPort, takenBy: handover.takenBy))
            )
            try await withThrowingDiscardingTaskGroup { group in
                do {
                    while true { try await take(try await connection.receive(), connection, &group) }
                } catch {
                    conversation.end(connection)
                    // A step that is under way must not wait for what will never come.
                    if conversation.isEmpty {
                        receiver?.abandon(error)
                        if case .offered = handover.state { disks?.interrupt() }
                    }
                    throw error
                }
            }
        } catch { failure = error }
        conversation.end(connection)
        guard conversation.isEmpty else { return }
        let isClosed = (failure as? ChannelError)?.code == .closed
        if let failure, handover.isOpen || handover.state == .new && !isClosed {
            log(.warning, "Migration \(id): \(failure)")
        }
        await exclusively { if self.conversation.isEmpty { await self.perform(.connectionLost) } }
    }

    /// Takes a frame: a message that changes something waits for those before it, everything else does not.
    private func take(
        _ frame: MessageConnection.Frame,
        _ connection: MessageConnection,
        _ group: inout ThrowingDiscardingTaskGroup<any Error>
    ) async throws {
        switch frame {
        case .data(let bytes) where conversation.isProbing:
            try await conversation.receiveProbe(bytes.count, connection)
        case .data(let bytes): try await receiver?.receive(bytes)
        case .message(.probe(let count)):
            guard receiver == nil else { throw ChannelError(.protocolViolation, "PROBE is not due") }
            try await conversation.beginProbe(count, connection)
        case .message(.ping): try await connection.send(.pong)
        case .message(.file(let index)): try receiver?.begin(index)
        case .message(let message):
            try conversation.enqueue()
            if case .abort = message { disks?.interrupt() }
            // A long step must not keep pings from being answered.
            group.addTask(executorPreference: agent.loop) {
                await self.exclusively {
                    await self.answer(message, connection)
                    self.conversation.dequeue()
                }
            }
        }
    }

    func exclusively(_ body: () async -> Void) async {
        await order.acquire()
        defer { order.release() }
        await body()
    }

    private func answer(_ message: Message, _ connection: MessageConnection) async {
        do {
            guard let event = try event(message) else { return }
            await perform(event, message.name, for: connection)
        } catch {
            await perform(.failed("\(error)"), message.name, for: connection)
        }
    }

    /// What a message means here; nil when it changes nothing.
    private func event(_ message: Message) throws -> DestinationHandover.Event? {
        switch message {
        case .secrets(let values):
            for (id, text) in values {
                guard secrets.count < 256, var bytes = Base64.decode(text.utf8) else {
                    throw GuestError("A secret of the offer is not Base64")
                }
                secrets[id] = try SecretBytes(wiping: &bytes)
            }
            return nil
        case .offer(let offer):
            if handover.state == .new { self.offer = offer }
            return .offer(isRehearsal: offer.isRehearsal)
        case .rehearsed(let rehearsed):
            guard shadow != nil else {
                throw ChannelError(.protocolViolation, "REHEARSED is not due: there is no blank copy")
            }
            self.rehearsed = rehearsed
            return .rehearsed
        case .mirrored: return .mirrored
        case .stream: return .stream
        case .prepared(let prepared):
            if handover.state == .ready { self.prepared = prepared }
            return .prepare
        case .release(let release): return .release(release)
        case .done: return .done
        case .abort(let reason): return .abort(reason)
        case .overruled(let by): return .overruled(by: by)
        default:
            throw ChannelError(
                .protocolViolation,
                "\(message.name) is not due in state \(handover.onWire.rawValue): it is a message of the destination"
            )
        }
    }

    /// Carries one of QEMU's connections.
    func serveStream(_ connection: MessageConnection) async throws {
        guard handover.isOpen, let target = shadow?.incomingSocket ?? guest?.streamSocket else {
            try await connection.send(.abort("No stream is due"))
            return
        }
        let near = try await SocketChannel.connect(to: .unix(path: target), on: agent.loop)
        try await connection.send(.welcome(.init(state: handover.onWire)))
        try await StreamRelay.run(near, connection.channel)
    }

    // MARK: - Others who want something

    /// An operator says that the source will never run the guest: it belongs here, if it is here.
    func take(by operatorName: String, _ vouching: Vouching) async throws -> String {
        try vouching.check(source: peer.name)
        var complaint: String?
        await exclusively { complaint = await self.perform(.take(by: "\(operatorName), \(vouching.words)")) }
        if let complaint { throw GuestError(complaint) }
        return offer?.guest ?? ""
    }

    /// The agent ends: what the source can still take back by itself is given up, everything else waits for the next
    /// agent with its QEMU and its images.
    func agentStops() async {
        absence?.cancel()
        if handover.isOpen { await interrupt("The destination agent was stopped") }
        await exclusively { await self.perform(.agentStops) }
    }

    /// Lets a step that is under way end early.
    private func interrupt(_ reason: String) async {
        receiver?.abandon(ChannelError(.closed, reason))
        disks?.interrupt()
        if case .offered = handover.state { guest?.interrupt() }
        let shadow = shadow
        self.shadow = nil
        await shadow?.stop()
    }

    /// Takes up what an earlier agent has left.
    func takeUp() async { await exclusively { await self.perform(.tryAgain) } }

    // MARK: - Carrying out

    /// Hands an event to the handover and does what follows, to the end.
    ///
    /// - Parameters:
    ///   - event: what happened.
    ///   - question: the message that it is.
    ///   - connection: who wants an answer.
    /// - Returns: what went wrong, for an operator.
    @discardableResult
    func perform(
        _ event: DestinationHandover.Event,
        _ question: String = "",
        for connection: MessageConnection? = nil
    ) async -> String? {
        var complaint: String?
        var actions = handover.handle(event)
        while !actions.isEmpty {
            let action = actions.removeFirst()
            if case .complain(let reason) = action { complaint = reason }
            guard let next = await carryOut(action, question, connection) else { continue }
            actions += handover.handle(next)
        }
        return complaint
    }

    private func carryOut(_ action: DestinationHandover.Action, _ message: String, _ connection: MessageConnection?)
        async
        -> DestinationHandover.Event?
    {
        switch action {
        case .carryOut(let step): return await carryOut(step, connection)
        case .append(let record): return await append(record)
        case .admit: return await admit()
        case .answer(let answer): await send(self.message(answer), message, connection)
        case .complain(let reason):
            log(.warning, "Migration \(id): \(message): \(reason)")
            // In `prepared` and later not the end of the migration, but the source's operator should know what holds it up.
            let isOpen = handover.onWire == .aborted || handover.onWire == .new
            let words = isOpen ? reason : "\(message) failed on the destination: \(reason)"
            try? await connection?.send(.abort(words))
            connection?.channel.abort(ChannelError(.closed, "\(message) failed: \(reason)"))
        case .close(let reason):
            log(.warning, "Migration \(id): \(message): \(reason)")
            connection?.channel.abort(ChannelError(.closed, reason))
        case .tell(let reason): await conversation.tell(.abort(reason))
        case .readBack:
            guest?.forgetSecrets()
            disks?.readBack()
        case .collectDigests:
            guard let digests = await disks?.collectDigests() else { return nil }
            try? await journal?.write(.digests(digests))
        case .cleanUp(let reason): await cleanUp(reason)
        case .finish: finish()
        case .warn(let by):
            log(
                .error,
                "Migration \(id): \(by) has taken guest '\(offer?.guest ?? guestName)' for \(peer.name), but it belongs to this host: "
                    + "both may run it. Stop one of them now; the copy that is stopped must never be started again"
            )
        case .waitForSource: waitForSource()
        case .stopWaiting: absence?.cancel()
        case .tryLater:
            Task(executorPreference: agent.loop) {
                await self.agent.loop.sleep(for: .seconds(5))
                await self.exclusively { await self.perform(.tryAgain) }
            }
        }
        return nil
    }

    private var guestName: String { ((try? agent.migrations.reading(of: id)) ?? nil)?.guest ?? "" }

    private func send(_ answer: Message, _ question: String, _ connection: MessageConnection?) async {
        do {
            try await connection?.send(answer)
        } catch {
            // The step went well, and only its answer did not get through: it will be asked for again.
            log(.warning, "Migration \(id): the answer to \(question) did not get through: \(error)")
            connection?.channel.abort(ChannelError(.closed, "The answer to \(question) did not get through"))
        }
    }

    private func message(_ answer: DestinationHandover.Answer) -> Message {
        switch answer {
        case .shadow: return sketch.map { Message.shadow($0) } ?? .abort("There is no blank copy")
        case .ready(let reasons) where !reasons.isEmpty || offer?.isRehearsal == true:
            return .ready(.init(reasons: reasons))
        case .ready:
            let exports = Dictionary(uniqueKeysWithValues: (offer?.disks ?? []).map { ($0.name, exportName($0)) })
            return .ready(.init(nbdPort: agent.nbdPort, exports: exports, keepsBacking: keptBacking.sorted()))
        case .mirrored: return .mirrored
        case .stream: return .stream
        case .prepared: return .prepared(.init())
        case .owned:
            let since = guest?.resumedAt.map { Double(($0.duration(to: .now)) / .milliseconds(1)) }
            return .owned(.init(digests: disks?.ownedDigests ?? ownedDigests, sinceResumed: since))
        case .refused(let reason): return .refused(reason)
        case .done: return .done
        case .abort(let reason): return .abort(reason)
        case .overruled(let by): return .overruled(by)
        }
    }

    /// The source may come back: the link was cut, or its network card was changed.
    private func waitForSource() {
        let patience = agent.configuration.patience
        log(.warning, "Migration \(id): the connection to the source was lost; waiting for \(patience)")
        absence?.cancel()
        absence = agent.loop.schedule(after: patience) {
            Task(executorPreference: self.agent.loop) {
                await self.exclusively { await self.perform(.absenceEnded("\(patience)")) }
            }
        }
    }

    // MARK: - The journal

    private func append(_ record: JournalRecord) async -> DestinationHandover.Event {
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
    func save(isReady: Bool, runState: RunState? = nil) async throws {
        guard let offer else { return }
        let saved = Saved(peer: peer, offer: offer, previous: previous, isReady: isReady, runState: runState)
        let (bytes, path) = (try JSONText.encode(saved), files.incoming)
        try await BlockingPool.shared.run { try DurableFile.write(bytes, to: path) }
    }
}
