internal import Emulator
internal import IO
internal import Migration
internal import TLS

extension IncomingMigration {
    func serve(_ connection: MessageConnection, _ features: Set<Feature>) async {
        conversation.begin(connection, features)
        sourceAddress = connection.channel.peerAddress?.host
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
        case .message(.console(let tail)):
            // It is the guest's own, once it belongs to this host; nobody waits for an answer.
            guard case .owned = handover.state, let guest = offer?.guest, conversation.takesConsole() else { return }
            await agent.configuration.followConsole?(guest, tail)
        case .message(.grant(let granting)):
            guard case .owned = handover.state, let guest = offer?.guest, conversation.takesGrant() else { return }
            let (grants, identity, log) = (agent.grants, peer.name, log)
            await BlockingPool.shared.value {
                do { try grants.add(granting, guest: guest, identity: identity) } catch {
                    log(.warning, "Guest '\(guest)': \(error)")
                }
            }
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
                    self.holdings.release(bytes)
                }
            }
        }
    }

    private func enqueue(_ bytes: Int) throws {
        try holdings.hold(bytes)
        do { try conversation.enqueue() } catch {
            holdings.release(bytes)
            throw error
        }
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
        case .secrets(let values): try secrets.add(values)
        case .offer(let offer):
            if handover.state == .new {
                try holdings.keep(bytes, of: message.name)
                self.offer = offer
            }
        case .rehearsed(let rehearsed):
            guard shadow != nil else {
                throw ChannelError(.protocolViolation, "REHEARSED is not due: there is no blank copy")
            }
            try holdings.keep(bytes, of: message.name)
            self.rehearsed = rehearsed
        case .prepared(let prepared):
            if handover.state == .ready {
                try holdings.keep(bytes, of: message.name)
                self.prepared = prepared
            }
        default: break
        }
        return try DestinationHandover.Event(message, in: handover.onWire)
    }

    /// Carries one of QEMU's connections, or a share of it, on a loop that carries nothing but data.
    func serveStream(
        _ lane: Message.Hello.Lane?,
        _ channel: TLSChannel,
        _ connection: MessageConnection
    ) async throws {
        guard handover.isOpen, let target = shadow?.incomingSocket ?? guest?.streamSocket else {
            return try await connection.send(.abort("No stream is due"))
        }
        if let lane, !(0..<StreamPiece.mostLanes).contains(lane.number) {
            return try await connection.send(
                .abort("A stream has at most \(StreamPiece.mostLanes) connections, numbered from 0")
            )
        }
        let loop = agent.dataLoops.next()
        if let lane, lane.number != 0 {
            guard let lanes, lanes.attempt == lane.attempt else {
                return try await connection.send(.abort("No stream is due that this connection could share"))
            }
            return try await serve(lane, of: lanes, channel, connection, on: loop)
        }
        let near = try await loop.run { try await SocketChannel.connect(to: .unix(path: target), on: loop) }
        guard let lane else {
            try await connection.send(.welcome(.init(state: handover.onWire)))
            return try await Self.carry(channel, on: loop) { [agent] far in
                try await StreamRelay.run(near, far, countBack: { agent.countMemory($0) })
            }
        }
        let isHeard = conversation.features.contains(.acknowledgedPieces)
        let lanes = LaneReceiver(to: near, attempt: lane.attempt, acknowledges: isHeard) { [agent] in
            agent.countMemory($0)
        }
        self.lanes?.abort("Its source sends the memory anew")
        self.lanes = lanes
        try await serve(lane, of: lanes, channel, connection, on: loop)
    }

    private func serve(
        _ lane: Message.Hello.Lane,
        of lanes: LaneReceiver,
        _ channel: TLSChannel,
        _ connection: MessageConnection,
        on loop: EventLoop
    ) async throws {
        do { try await lanes.join() } catch {
            if lane.number == 0 { lanes.abort("\(error)") }
            return try await connection.send(.abort("\(error)"))
        }
        do {
            try await connection.send(.welcome(.init(state: handover.onWire)))
            try await Self.carry(channel, on: loop) { try await lanes.carry($0, number: lane.number) }
        } catch {
            // The others would wait for what it was to bring.
            lanes.abort("\(error)")
            throw error
        }
    }

    /// Moves a connection to a loop, and closes it there when what it carries has ended.
    private static func carry(
        _ channel: TLSChannel,
        on loop: EventLoop,
        _ body: @escaping @Sendable (TLSChannel) async throws -> Void
    ) async throws {
        let moved = try await channel.moved(to: loop)
        try await loop.run {
            defer { moved.close() }
            try await body(moved)
        }
    }

    func send(_ answer: Message, _ question: String, _ connection: MessageConnection?) async {
        do {
            try await connection?.send(answer)
        } catch {
            // The step went well, and only its answer did not get through: it will be asked for again.
            log(.warning, "Migration \(id): the answer to \(question) did not get through: \(error)")
            connection?.channel.abort(ChannelError(.closed, "The answer to \(question) did not get through"))
        }
    }

    func message(_ answer: DestinationHandover.Answer) -> Message {
        switch answer {
        case .shadow: return sketch.map { Message.shadow($0) } ?? .abort("There is no blank copy")
        case .ready(let reasons) where !reasons.isEmpty || offer?.isRehearsal == true:
            return .ready(.init(reasons: reasons, checks: Obstacle.checks(of: reasons, in: obstacles)))
        case .ready:
            let exports = Dictionary(uniqueKeysWithValues: (offer?.disks ?? []).map { ($0.name, exportName($0)) })
            return .ready(
                .init(
                    nbdPort: agent.nbdPort,
                    exports: exports,
                    keepsBacking: keptBacking.sorted(),
                    seeds: seedProofs,
                    listeners: guest?.listeners
                )
            )
        case .mirrored: return .mirrored
        case .stream: return .stream
        case .prepared: return .prepared(.init())
        case .owned:
            let since = guest?.resumedAt.map { Double(($0.duration(to: .now)) / .milliseconds(1)) }
            return .owned(.init(digests: disks?.ownedDigests ?? ownedDigests, sinceResumed: since))
        case .refused(let reason): return .refused(reason)
        case .done: return .done
        // A source whose stream broke cannot know why.
        case .abort(let reason): return .abort(guest?.refusal ?? refusal ?? reason)
        case .overruled(let by): return .overruled(by)
        }
    }

}
