internal import Emulator
internal import Glibc
internal import IO
internal import Migration
internal import TLS

/// One migration, seen from the destination.
///
/// Until PREPARED is durable a lost connection ends it and leaves nothing behind. From then on only the source can: the
/// guest may have been released, so everything is kept until RELEASE or ABORT comes, over a new connection if need be.
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
    }

    let id: String
    let peer: TLSPeer
    unowned let agent: DestinationAgent
    var state = DestinationState.new
    var offer: Message.Offer?
    var images: IncomingImages?
    var record: GuestRecord?
    var monitor: QMPClient?
    var journal: Journal?
    var guestLock: FileLock?
    var ownedDigests: [String: String] = [:]
    /// When this agent resumed the guest.
    var resumedAt: ContinuousClock.Instant?
    var finalDigests: Task<Void, any Error>?
    var receiver: FileReceiver?
    /// The blank copy of the guest, while its move is rehearsed.
    var shadow: ShadowEmulator?
    /// The values of the guest's secrets; never on a disk.
    var secrets: [String: SecretBytes] = [:]
    /// Bytes of a PROBE that are still to come.
    var probe = 0
    let order = AsyncLock()
    var previous: GuestRecord?
    var hasStarted = false
    var outputs: Set<String> = []
    var connections: [MessageConnection] = []
    private var waitingMessages = 0
    /// Whether the guest was resumed here, after OWNER.
    var runsHere = false
    /// Whether the only connection was lost while a step was under way.
    var isCutOff = false
    /// Whether READY was said.
    var isReady = false
    /// Whether QEMU was told to take a stream: it takes one only once.
    var hasListened = false
    /// Ends the wait for a source that was lost.
    private var absence: LoopTimer?
    /// A pass over what was written, beside everything else, and the wait for the next one.
    var settling: Task<Void, Never>?
    var settleTimer: LoopTimer?
    var maySettle = false
    /// Whether the disks are copied, and the memory comes next.
    var isMemoryDue = false
    /// How often QEMU ended here for a reason that is not known to be a broken stream.
    private var unexplainedEnds = 0
    /// What the source says of its disks.
    var proofs: [String: DiskProof] = [:]
    var isFull = false
    /// Why this migration was given up, once that is durable: the guest can never run here by it.
    var refusal: String?
    /// Whether OWNER could be written, but perhaps not durably.
    var isOwnerInDoubt = false
    /// Whether it could not be taken up after a restart of the agent; that is tried again.
    var isStuck = false

    init(_ id: String, peer: TLSPeer, agent: DestinationAgent) {
        self.id = id
        self.peer = peer
        self.agent = agent
    }

    /// A migration that ended here may be asked for again by a source that did not hear OWNED: the journal answers.
    static func open(_ id: String, peer: TLSPeer, agent: DestinationAgent) -> IncomingMigration {
        let migration = IncomingMigration(id, peer: peer, agent: agent)
        guard let reading = try? agent.migrations.reading(of: id), reading.peer == peer.name,
            case .destination(let standing) = reading.standing
        else { return migration }
        switch standing {
        case .owner(let digests), .taken(_, let digests):
            migration.state = .done
            migration.ownedDigests = digests
        case .rolledBack(let reason):
            migration.state = .aborted
            migration.refusal = reason
        case .overruled: migration.state = .done
        case .accepted, .prepared: break
        }
        return migration
    }

    var isOver: Bool { (state == .new && connections.isEmpty && !isStuck) || state == .done || state == .aborted }
    var files: MigrationFiles { agent.migrations.files(of: id) }
    var incomingSocket: String { "\(agent.guests.directory(of: offer?.guest ?? ""))/incoming.sock" }
    var log: Log { agent.log }

    // MARK: The conversation

    func serve(_ connection: MessageConnection) async {
        absence?.cancel()
        // The source has one: what is still there of an earlier one is a connection whose loss was not noticed here.
        for earlier in connections {
            earlier.channel.abort(ChannelError(.closed, "The source has connected again"))
        }
        connections.append(connection)
        do {
            try await connection.send(.welcome(.init(state: state, nbdPort: agent.nbdPort)))
            try await withThrowingDiscardingTaskGroup { group in
                do {
                    while true {
                        switch try await connection.receive() {
                        case .data(let bytes) where probe > 0: try await receiveProbe(bytes.count, connection)
                        case .data(let bytes): try await receiver?.receive(bytes)
                        case .message(.probe(let count)): try await beginProbe(count, connection)
                        case .message(.ping): try await connection.send(.pong)
                        case .message(.file(let index)): try receiver?.begin(index)
                        case .message(let message):
                            guard waitingMessages < 8 else {
                                throw ChannelError(.protocolViolation, "too many messages at once")
                            }
                            waitingMessages += 1
                            if case .abort = message { images?.stopDigests() }
                            // A long step must not keep pings from being answered.
                            group.addTask(executorPreference: self.agent.loop) {
                                await self.order.acquire()
                                defer {
                                    self.order.release()
                                    self.waitingMessages -= 1
                                }
                                await self.answer(message, connection)
                            }
                        }
                    }
                } catch {
                    // A step that is under way must not wait for what will never come.
                    isCutOff = connections.count == 1
                    if isCutOff {
                        receiver?.abandon(error)
                        if state == .offered, !isReady { images?.stopDigests() }
                    }
                    throw error
                }
            }
        } catch {
            if state == .new || state == .offered {
                let closed = (error as? ChannelError)?.code == .closed
                if state == .offered || !closed { log(.warning, "Migration \(id): \(error)") }
            }
        }
        connections.removeAll { $0 === connection }
        // Whoever lost the connection before PREPARED rolls back; so does the other side.
        if connections.isEmpty {
            switch state {
            case .offered where isReady: waitForSource()
            case .new, .offered: await giveUp("The connection to the source was lost")
            case .owner: if runsHere { finish() } else { tryAgain() }
            case .prepared, .done, .aborted: break
            }
        }
    }

    /// The source may come back: the link was cut, or its network card was changed.
    func waitForSource() {
        log(
            .warning,
            "Migration \(id): the connection to the source was lost; waiting for \(agent.configuration.patience)"
        )
        absence?.cancel()
        absence = agent.loop.schedule(after: agent.configuration.patience) {
            guard self.state == .offered, self.connections.isEmpty else { return }
            Task(executorPreference: self.agent.loop) {
                await self.order.acquire()
                defer { self.order.release() }
                guard self.state == .offered, self.connections.isEmpty else { return }
                await self.giveUp("The source did not come back within \(self.agent.configuration.patience)")
            }
        }
    }

    /// Handles a message; what goes wrong before PREPARED ends the migration and is told to the source.
    private func answer(_ message: Message, _ connection: MessageConnection) async {
        let reply: Message?
        do {
            reply = try await handle(message, connection)
        } catch {
            log(.warning, "Migration \(id): \(message.name): \(error)")
            // An ABORT in answer to ABORT would say that this migration is over, durably.
            if case .abort = message {
                connection.channel.abort(ChannelError(.closed, "ABORT failed: \(error)"))
                return
            }
            if state == .new || state == .offered {
                await giveUp("\(error)")
                try? await connection.send(.abort("\(error)"))
            } else {
                // Not the end of the migration, but the source's operator should know what holds it up.
                try? await connection.send(.abort("\(message.name) failed on the destination: \(error)"))
            }
            connection.channel.abort(ChannelError(.closed, "\(message.name) failed: \(error)"))
            return
        }
        guard let reply else { return }
        do {
            try await connection.send(reply)
        } catch {
            // The step went well, and only its answer did not get through: it will be asked for again.
            log(.warning, "Migration \(id): the answer to \(message.name) did not get through: \(error)")
            connection.channel.abort(ChannelError(.closed, "The answer to \(message.name) did not get through"))
        }
    }

    /// QEMU ended while it waited for the guest: the source hears why, in QEMU's words.
    func emulatorEnded() {
        guard state == .offered, let offer else { return }
        let words = EmulatorProcess.tail(of: agent.guests.log(of: offer.guest))
        let reason = "QEMU on the destination ended: \(words.isEmpty ? "it said nothing" : words)"
        log(.warning, "Migration \(id): \(reason)")
        // A QEMU whose stream was cut ends with EIO, and one that was killed without a word: the next STREAM starts another.
        if isReady, words.isEmpty || words.contains("Input/output error") { return }
        // A stream that was damaged looks like one of another machine, but only once.
        unexplainedEnds += 1
        if isReady, unexplainedEnds < 2 { return }
        for connection in connections {
            Task(executorPreference: agent.loop) { try? await connection.send(.abort(reason)) }
        }
    }

    /// Carries out what a message asks for.
    ///
    /// - Returns: the answer; nil when there is none.
    private func handle(_ message: Message, _ connection: MessageConnection) async throws -> Message? {
        switch (message, state) {
        case (.secrets(let values), .new), (.secrets(let values), .offered):
            for (id, text) in values {
                guard secrets.count < 256, var bytes = Base64.decode(text.utf8) else {
                    throw GuestError("A secret of the offer is not Base64")
                }
                secrets[id] = try SecretBytes(wiping: &bytes)
            }
            return nil
        case (.offer(let offer), .new): return try await accept(offer)
        case (.rehearsed(let rehearsed), .offered): return try await proceed(rehearsed, connection)
        case (.mirrored, .offered):
            await endSettling()
            isMemoryDue = true
            try await images?.updateDigests(.running)
            settle()
            return .mirrored
        case (.stream, .offered) where isReady:
            // An agent that took the place of another one begins here.
            isMemoryDue = true
            try await listen()
            settle()
            return .stream
        case (.prepared(let prepared), .offered), (.prepared(let prepared), .prepared):
            try await prepare(prepared)
            return .prepared(.init())
        case (.release(let release), .prepared), (.release(let release), .owner), (.release(let release), .done):
            do {
                if state != .done { try await own(release) }
                let since = resumedAt.map { Double(($0.duration(to: .now)) / .milliseconds(1)) }
                return .owned(.init(digests: ownedDigests, sinceResumed: since))
            } catch let refused as Refusal {
                return .refused(refused.reasons.joined(separator: "; "))
            }
        case (.release, .aborted):
            try makeRefusalDurable("It was given up here")
            guard let refusal else { throw GuestError("This migration was not begun here") }
            return .refused(refusal)
        case (.done, .owner), (.done, .done):
            finish()
            return .done
        case (.abort(let reason), .new), (.abort(let reason), .offered):
            await giveUp(reason)
            try makeRefusalDurable(reason)
            return .abort(reason)
        case (.abort(let reason), .prepared) where !isOwnerInDoubt:
            try await refuse(reason)
            return .abort(reason)
        case (.abort(let reason), .aborted):
            try makeRefusalDurable(reason)
            return .abort(reason)
        default:
            throw ChannelError(.protocolViolation, "\(message.name) is not due in state \(state.rawValue)")
        }
    }

    // MARK: OFFER

    private func accept(_ offer: Message.Offer) async throws -> Message {
        self.offer = offer
        state = .offered
        return try await answering(offer) {
            try begin(offer)
            let reasons = await check(offer)
            if !reasons.isEmpty { throw Refusal(reasons: reasons) }
            return .shadow(try await startShadow(offer))
        }
    }

    /// Runs a step of an offer; what fails is told as the reason why the guest is not taken.
    private func answering(_ offer: Message.Offer, _ body: () async throws -> Message) async throws -> Message {
        do {
            return try await body()
        } catch let error as ChannelError where error.code == .closed || error.code == .truncated {
            throw error
        } catch {
            let reasons = (error as? Refusal)?.reasons ?? ["\(error)"]
            log(.warning, "Migration \(id): refused guest '\(offer.guest)': \(reasons.joined(separator: "; "))")
            await giveUp(reasons.joined(separator: "; "))
            return .ready(.init(reasons: reasons))
        }
    }

    /// The rehearsal is over: what it showed decides whether anything is made.
    private func proceed(_ rehearsed: Message.Rehearsed, _ connection: MessageConnection) async throws -> Message {
        guard let offer, shadow != nil else {
            throw ChannelError(.protocolViolation, "REHEARSED is not due in state \(state.rawValue)")
        }
        return try await answering(offer) {
            if let reason = await endShadow() { throw Refusal(reasons: [reason]) }
            if offer.isRehearsal { return .ready(.init()) }
            let found = try await findFiles(offer, connection)
            let keeps = await keptBacking(offer, rehearsed)
            try await startGuest(offer, files: found, keepsBacking: keeps)
            isReady = true
            try save(offer)
            settle()
            let exports = Dictionary(uniqueKeysWithValues: offer.disks.map { ($0.name, exportName($0)) })
            log(.info, "Migration \(id): receiving guest '\(offer.guest)' from \(peer.name)")
            return .ready(.init(nbdPort: agent.nbdPort, exports: exports, keepsBacking: keeps.sorted()))
        }
    }

    // MARK: STREAM

    /// Has QEMU wait for the memory; one that ends meanwhile is replaced.
    private func listen() async throws {
        var attempts = 0
        while true {
            do {
                let monitor = try await freshEmulator()
                unlink(incomingSocket)
                hasListened = true
                return try await monitor.migrateIncoming(socket: incomingSocket)
            } catch let error where monitor?.isConnected != true && state == .offered {
                attempts += 1
                guard attempts < 3 else { throw error }
                log(.warning, "Migration \(id): QEMU ended before the memory came: \(error)")
            }
        }
    }

    /// Carries one of QEMU's connections.
    func serveStream(_ connection: MessageConnection) async throws {
        guard state == .offered,
            let target = shadow?.incomingSocket ?? (monitor != nil && hasListened ? incomingSocket : nil)
        else {
            try await connection.send(.abort("No stream is due"))
            return
        }
        let near = try await SocketChannel.connect(to: .unix(path: target), on: agent.loop)
        try await connection.send(.welcome(.init(state: state)))
        try await StreamRelay.run(near, connection.channel)
    }

    // MARK: The way back

    /// The agent ends: what the source can still take back by itself is given up, everything else waits for the next
    /// agent with its QEMU and its images.
    func agentStops() async {
        absence?.cancel()
        guard state == .new || state == .offered else { return }
        let reason = "The destination agent was stopped"
        // A source that only lost the connection would wait for it.
        for connection in connections {
            try? await connection.channel.withDeadline(.seconds(1), for: "ABORT") {
                try await connection.send(.abort(reason))
            }
        }
        await giveUp(reason)
    }

    /// Ends the migration before the release and leaves nothing behind.
    func giveUp(_ reason: String) async {
        guard state == .new || state == .offered || state == .prepared else { return }
        let began = journal != nil
        state = .aborted
        absence?.cancel()
        finalDigests?.cancel()
        images?.stopDigests()
        _ = try? await finalDigests?.value
        await settling?.value
        do { try makeRefusalDurable(reason) } catch { log(.error, "Migration \(id): \(error)") }
        secrets = [:]
        for file in offer?.files ?? [] where file.path.hasPrefix("header:") && file.digest.allSatisfy(\.isHexDigit) {
            unlink("\(agent.configuration.imageDirectory)/.files/\(file.digest)")
        }
        if let shadow {
            self.shadow = nil
            await shadow.stop()
        }
        monitor?.close()
        monitor = nil
        if let offer, began {
            if hasStarted {
                // QEMU's process is recorded before its monitor answers.
                let known = (try? agent.guests.load(offer.guest)) ?? nil
                // It may be replaced at this moment.
                await record?.process?.terminate()
                await known?.process?.terminate()
                agent.guests.remove(offer.guest)
                if let previous { try? agent.guests.save(previous) }
            }
            await images?.delete()
            unlink(files.incoming)
            unlink(proofsFile)
            log(.info, "Migration \(id): gave up guest '\(offer.guest)': \(reason)")
        }
        images = nil
        guestLock = nil
    }
}
