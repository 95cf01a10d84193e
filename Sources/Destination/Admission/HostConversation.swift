internal import IO
internal import Migration
internal import TLS

/// A connection with the role `host`: what one identity asks of this host for an evacuation.
final class HostConversation: @unchecked Sendable {
    // Unchecked: confined to the agent's control loop.

    /// What a peer may ask for.
    enum Rights {
        /// Whatever a source may.
        case all
        /// Its next certificate, and nothing else: a member of the fleet that sends no guests.
        case renewal
    }

    private unowned let agent: DestinationAgent
    private let peer: TLSPeer
    private let evacuation: String
    private let rights: Rights
    private let connection: MessageConnection
    /// The turns that were asked for here, by the numbers of the questions.
    private var turns: [UInt32: SwitchoverTurns.Turn] = [:]

    /// The examination that is under way for this connection.
    private var examination: KeyedSemaphore.Permit?

    init(
        _ agent: DestinationAgent,
        _ peer: TLSPeer,
        evacuation: String,
        _ rights: Rights,
        _ connection: MessageConnection
    ) {
        self.rights = rights
        self.agent = agent
        self.peer = peer
        self.evacuation = evacuation
        self.connection = connection
    }

    /// Answers one question after the other, until the connection ends. A peer that is silent is taken for dead.
    func serve() async throws {
        defer {
            for turn in turns.values { turn.end() }
            examination?.leave()
        }
        connection.limit = PeerLimits.hostMessage
        try await connection.send(.welcome(.init(state: .new)))
        do {
            while true {
                let message = try await connection.channel.withDeadline(PeerLimits.hostSilence, for: "The next word") {
                    try await self.connection.receiveMessage()
                }
                switch message {
                case .ping: try await connection.send(.pong)
                case .host(let question): try await answer(question)
                default:
                    throw ChannelError(.protocolViolation, "\(message.name) is not due on a connection for a host")
                }
            }
        } catch let error as ChannelError where error.code == .protocolViolation {
            try? await connection.send(.abort("\(error)"))
            throw error
        } catch let error as ChannelError where error.code == .closed {}
    }

    private func answer(_ question: HostMessage) async throws {
        let (number, name) = (question.number, peer.name)
        let content: HostMessage.Content
        switch question.content {
        case .renew(let request): content = await agent.renew(request, for: name)
        case _ where rights == .renewal: content = .denied(DestinationAgent.refusal(of: name))
        case .host(nil):
            do { content = .host(try await agent.state(for: name)) } catch { content = .denied("\(error)") }
        case .reserve(let room): content = await agent.reserve(room, for: name, evacuation)
        case .unreserve(let id): content = await agent.release(id, of: name, evacuation)
        case .turn: return try await beginTurn(number)
        case .turned:
            turns.removeValue(forKey: number)?.end()
            return
        case .recall(let recall): content = await agent.recall(recall, for: peer)
        case .examine where examination != nil:
            content = .denied("An examination is under way already on this connection; wait for its answer")
        case .examine(let examine): return beginExamination(number, examine)
        case .members(let members): content = await agent.take(members, from: name)
        case .host, .reserved, .recalled, .examined, .renewed, .denied:
            throw ChannelError(.protocolViolation, "\(question.name) is not due: it is a message of the destination")
        }
        try await connection.send(.host(HostMessage(number, content)))
    }

    /// The turn may take long, and other questions are answered meanwhile.
    private func beginTurn(_ number: UInt32) async throws {
        guard turns[number] == nil else {
            throw ChannelError(.protocolViolation, "TURN is not due: it was asked for with this number already")
        }
        let turn: SwitchoverTurns.Turn
        do { turn = try agent.turns.request(peer.name) } catch {
            return try await connection.send(.host(HostMessage(number, .denied("\(error)"))))
        }
        turns[number] = turn
        Task(executorPreference: agent.loop) {
            do {
                try await turn.wait { self.tell(number, .turned) }
                try await self.connection.send(.host(HostMessage(number, .turn(""))))
            } catch {
                // Whoever has left the queue wants no answer.
                turn.end()
            }
        }
    }

    /// It takes seconds, and other questions are answered meanwhile.
    private func beginExamination(_ number: UInt32, _ examine: HostMessage.Examine) {
        let (peer, address) = (peer, connection.channel.peerAddress)
        let turn = agent.accounts.figures.request(peer.name)
        examination = turn
        Task(executorPreference: agent.loop) {
            defer { self.examination = nil }
            let content = await self.agent.examine(examine, for: peer, at: address, turn)
            try? await self.connection.send(.host(HostMessage(number, content)))
        }
    }

    private func tell(_ number: UInt32, _ content: HostMessage.Content) {
        turns[number] = nil
        Task(executorPreference: agent.loop) { try? await self.connection.send(.host(HostMessage(number, content))) }
    }
}
