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
    struct Saved: Codable, Sendable {
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
    /// Set once nobody waits for what is being checked.
    let abandonment = Abandonment()
    /// The right to start a blank copy, and to keep it.
    var turn: KeyedSemaphore.Permit?
    /// The digests of files that the offer names.
    private(set) lazy var fileDigests = FileDigests(agent.accounts.digests, key: peer.name, abandonment)
    /// Bytes of what is kept of the source's messages, by the kind of message.
    private var kept: [String: Int] = [:]
    /// Whether the guest is one of those that its source has on the way.
    private var isCounted = false
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
                        if case .offered = handover.state { abandon() }
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
        case .message(.file(let index)): try await receiver?.begin(index)
        case .message(let message):
            // Short ones are bounded by their number: RELEASE never waits for what the source holds otherwise.
            let bytes = connection.messageBytes > PeerLimits.shortMessage ? connection.messageBytes : 0
            do { try enqueue(bytes) } catch {
                // An ABORT in answer to ABORT would say that this migration is over, durably.
                if case .abort = message { throw error }
                try? await connection.send(.abort("\(error)"))
                throw error
            }
            if case .abort = message { abandon() }
            // A long step must not keep pings from being answered.
            group.addTask(executorPreference: agent.loop) {
                await self.exclusively {
                    await self.answer(message, bytes, connection)
                    self.conversation.dequeue()
                    self.agent.accounts.release(bytes, for: self.peer.name)
                }
            }
        }
    }

    private func enqueue(_ bytes: Int) throws {
        try agent.accounts.hold(bytes, for: peer.name)
        do { try conversation.enqueue() } catch {
            agent.accounts.release(bytes, for: peer.name)
            throw error
        }
    }

    func exclusively(_ body: () async -> Void) async {
        await order.acquire()
        defer { order.release() }
        await body()
    }

    private func answer(_ message: Message, _ bytes: Int, _ connection: MessageConnection) async {
        do {
            guard let event = try event(message, bytes) else { return }
            await perform(event, message.name, for: connection)
        } catch {
            await perform(.failed("\(error)"), message.name, for: connection)
        }
    }

    /// What a message of so many bytes means here; nil when it changes nothing.
    private func event(_ message: Message, _ bytes: Int) throws -> DestinationHandover.Event? {
        switch message {
        case .secrets(let values): try keepSecrets(values)
        case .offer(let offer):
            if handover.state == .new {
                try keep(bytes, of: message.name)
                self.offer = offer
            }
        case .rehearsed(let rehearsed):
            guard shadow != nil else {
                throw ChannelError(.protocolViolation, "REHEARSED is not due: there is no blank copy")
            }
            try keep(bytes, of: message.name)
            self.rehearsed = rehearsed
        case .prepared(let prepared):
            if handover.state == .ready {
                try keep(bytes, of: message.name)
                self.prepared = prepared
            }
        default: break
        }
        return try DestinationHandover.Event(message, in: handover.onWire)
    }

    private func keepSecrets(_ values: [String: String]) throws {
        var total = secrets.reduce(0) { $0 + $1.key.utf8.count + $1.value.count }
        for (id, text) in values {
            guard var bytes = Base64.decode(text.utf8) else { throw GuestError("A secret of the offer is not Base64") }
            if let earlier = secrets[id] { total -= id.utf8.count + earlier.count }
            total += id.utf8.count + bytes.count
            guard secrets[id] != nil || secrets.count < PeerLimits.secrets, total <= PeerLimits.secretBytes else {
                throw GuestError(
                    "The limit of \(PeerLimits.secrets) secrets of \(PeerLimits.secretBytes >> 10) KiB together is reached"
                )
            }
            secrets[id] = try SecretBytes(wiping: &bytes)
        }
    }

    // MARK: - What the source holds here

    /// Counts the bytes of a message that is kept, in the place of an earlier one of its kind.
    private func keep(_ bytes: Int, of kind: String) throws {
        agent.accounts.release(kept.removeValue(forKey: kind) ?? 0, for: peer.name)
        try agent.accounts.hold(bytes, for: peer.name)
        kept[kind] = bytes
    }

    /// Counts the guest among those that its source has on the way.
    func countGuest() throws {
        guard !isCounted else { return }
        try agent.accounts.beginGuest(peer.name)
        isCounted = true
    }

    private func closeAccount() {
        agent.accounts.release(kept.values.reduce(0, +), for: peer.name)
        kept = [:]
        if isCounted { agent.accounts.endGuest(peer.name) }
        isCounted = false
        endTurn()
    }

    /// The blank copy is gone, or will not come.
    func endTurn() {
        turn?.end()
        turn = nil
    }

    /// Nobody waits any more for what is being checked or read.
    private func abandon() {
        disks?.interrupt()
        abandonment.happen()
        fileDigests.leave()
        turn?.leave()
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
        abandon()
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
        if handover.isOver {
            closeAccount()
            if conversation.isEmpty { agent.forget(self) }
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
        let path = files.incoming
        try await BlockingPool.shared.run { try DurableFile.write(try JSONText.encode(saved), to: path) }
    }
}
