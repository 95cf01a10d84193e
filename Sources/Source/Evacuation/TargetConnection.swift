internal import IO
internal import Migration
internal import TLS

/// A connection with the role `host`: questions with numbers, answers in any order.
final class TargetConnection: @unchecked Sendable {
    // Unchecked: confined to the loop.
    private typealias Waiting = UnsafeContinuation<HostMessage.Content, any Error>

    /// Shorter than what a destination agent waits for a word.
    private static let pingInterval = Duration.seconds(3)
    private static let silence = Duration.seconds(15)

    let session: TLSSession
    let features: Set<Feature>
    private let connection: MessageConnection
    private let loop: EventLoop
    private let host: String
    private var waiting: [UInt32: Waiting] = [:]
    private var turns: [UInt32: WeakTurn] = [:]
    private var last: UInt32 = 0
    private var lastHeard = ContinuousClock.now
    private(set) var failure: MigrationError?

    private struct WeakTurn { weak var turn: SwitchoverTurn? }

    private init(_ channel: TLSChannel, _ host: String, _ features: Set<Feature>) {
        session = channel.session
        connection = MessageConnection(channel)
        loop = channel.loop
        self.host = host
        self.features = features
    }

    /// Connects and greets.
    ///
    /// - Throws: `MigrationError`; with `refused` or `unreachable` also when the agent does not know such connections.
    static func open(
        _ peer: ControlConnection.Peer,
        evacuation: String,
        credentials: any TLSCredentials,
        on loop: EventLoop
    ) async throws -> TargetConnection {
        let hello = Message.Hello(role: .host, migration: evacuation)
        let (channel, welcome) = try await ControlConnection.greet(peer, hello, credentials, loop)
        let connection = TargetConnection(channel, peer.host, Feature.known(welcome.features))
        Task(executorPreference: loop) { await connection.receive() }
        Task(executorPreference: loop) { await connection.ping() }
        return connection
    }

    /// What an agent can do, as it says in any greeting.
    static func features(
        of peer: ControlConnection.Peer,
        credentials: any TLSCredentials,
        on loop: EventLoop
    ) async throws -> Set<Feature> {
        let hello = Message.Hello(role: .control, migration: MigrationStore.makeID())
        let (channel, welcome) = try await ControlConnection.greet(peer, hello, credentials, loop)
        try? await channel.finishWriting()
        channel.close()
        return Feature.known(welcome.features)
    }

    // MARK: questions

    /// Asks, and waits for the answer.
    func ask(_ content: HostMessage.Content, patience: Duration) async throws -> HostMessage.Content {
        let number = nextNumber()
        let timer = loop.schedule(after: patience) {
            self.fail(MigrationError(.unreachable, "\(self.host) did not answer within \(patience)"))
        }
        defer { timer.cancel() }
        return try await answer(to: HostMessage(number, content))
    }

    /// Asks for a turn.
    func turn(_ guest: String, patience: Duration) async throws -> SwitchoverTurn {
        let number = nextNumber()
        let timer = loop.schedule(after: patience) {
            let reason =
                "Others have their switchovers on \(self.host): the turn of guest '\(guest)' did not come within \(patience)"
            self.leave(number, MigrationError(.busy, reason))
        }
        defer { timer.cancel() }
        let answer = try await withTaskCancellationHandler {
            try await self.answer(to: HostMessage(number, .turn(guest)))
        } onCancel: {
            loop.execute { self.leave(number, MigrationError(.cancelled, "Nobody waits for this turn any more")) }
        }
        switch answer {
        case .turn:
            let turn = SwitchoverTurn { [weak self, loop] in
                let connection = self
                loop.execute { connection?.giveBack(number) }
            }
            turns[number] = WeakTurn(turn: turn)
            // The connection may have been lost since.
            if failure != nil { turn.lapse() }
            return turn
        case .denied(let reason):
            throw MigrationError(.refused, "\(host) refused TURN: \(MigrationContext.said(reason))")
        case let other: throw MigrationError(.failed, "\(host) answered TURN with \(HostMessage(number, other).name)")
        }
    }

    private func nextNumber() -> UInt32 {
        last &+= 1
        return last
    }

    private func answer(to question: HostMessage) async throws -> HostMessage.Content {
        if let failure { throw failure }
        return try await withUnsafeThrowingContinuation { (continuation: Waiting) in
            waiting[question.number] = continuation
            Task(executorPreference: loop) {
                do { try await self.connection.send(.host(question)) } catch {
                    self.fail(MigrationError(.unreachable, "The connection to \(self.host) was lost: \(error)"))
                }
            }
        }
    }

    /// Waits no longer for a turn.
    private func leave(_ number: UInt32, _ reason: MigrationError) {
        guard let waiting = waiting.removeValue(forKey: number) else { return }
        giveBack(number)
        waiting.resume(throwing: reason)
    }

    private func giveBack(_ number: UInt32) {
        turns[number] = nil
        guard failure == nil else { return }
        Task(executorPreference: loop) { try? await self.connection.send(.host(HostMessage(number, .turned))) }
    }

    // MARK: the connection

    private func receive() async {
        do {
            while true {
                switch try await connection.receiveMessage() {
                case .host(let message): take(message)
                case .abort(let reason):
                    throw MigrationError(.refused, "\(host) gave up: \(MigrationContext.said(reason))")
                default: break
                }
                lastHeard = .now
            }
        } catch let error as MigrationError { fail(error) } catch {
            fail(MigrationError(.unreachable, "The connection to \(host) was lost: \(error)"))
        }
    }

    private func take(_ message: HostMessage) {
        if let waiting = waiting.removeValue(forKey: message.number) {
            waiting.resume(returning: message.content)
        } else if case .turned = message.content {
            turns.removeValue(forKey: message.number)?.turn?.lapse()
        }
    }

    private func ping() async {
        while failure == nil {
            await loop.sleep(for: Self.pingInterval)
            guard failure == nil else { return }
            // A send may wait for a link that is dead; the judgement below must not wait with it.
            Task(executorPreference: loop) { try? await self.connection.send(.ping) }
            if ContinuousClock.now - lastHeard > Self.silence {
                fail(MigrationError(.unreachable, "\(host) has been silent for \(Self.silence)"))
            }
        }
    }

    private func fail(_ error: MigrationError) {
        guard failure == nil else { return }
        failure = error
        connection.close()
        for turn in turns.values { turn.turn?.lapse() }
        turns = [:]
        let left = waiting
        waiting = [:]
        for continuation in left.values { continuation.resume(throwing: error) }
    }

    /// Says good-bye, so that the other host has nothing to log, and closes.
    func end() async {
        _ = try? await connection.channel.withDeadline(.seconds(1), for: "The end") {
            try await connection.channel.finishWriting()
        }
        close()
    }

    func close() { fail(MigrationError(.failed, "The connection to \(host) was closed")) }
}
