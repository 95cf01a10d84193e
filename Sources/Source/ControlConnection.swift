internal import IO
internal import Migration
internal import TLS

/// The source's end of the conversation with the destination agent.
final class ControlConnection: @unchecked Sendable {
    // Unchecked: confined to the control loop.
    private static let pingInterval = Duration.seconds(3)
    /// A destination that says nothing for so long, in spite of pings, is taken for lost.
    private static let patience = Duration.seconds(15)

    let session: TLSSession
    /// How long the destination took to answer the greeting: a round trip, and what it does meanwhile.
    let greetingTime: Duration
    /// Whether the line is so long that a question is worth asking before the answer to the one before has come.
    var isFar: Bool { MigrationContext.milliseconds(greetingTime) >= LinkMeasure.longLine }
    private let connection: MessageConnection
    private let loop: EventLoop
    private var inbox: [(message: Message, at: ContinuousClock.Instant)] = []
    /// When the message came that `next` has returned last, which may have been long before somebody asked for it.
    private(set) var arrival = ContinuousClock.now
    private let arrived = AsyncCondition()
    /// How many questions of `ask` have no answer yet.
    private var asked = 0
    private var isPinging = false
    private var lastHeard = ContinuousClock.now
    private(set) var failure: MigrationError?
    /// With which words the destination has given up.
    private(set) var lastWords: String?
    /// Whether it ended because of the link, or of a destination that was silent: another one may go on where it stopped.
    private(set) var isLost = false
    /// Is told how far the destination is with reading back the disks.
    var onReadBack: ((Message.ReadBack) -> Void)?
    /// What ends a wait for an answer from outside; the connection stays usable.
    var interruption: MigrationError? { didSet { arrived.signal() } }
    /// Told once when the connection fails or the destination gives up.
    var onFailure: ((MigrationError) -> Void)?

    private init(_ channel: TLSChannel, _ greetingTime: Duration) {
        self.greetingTime = greetingTime
        session = channel.session
        connection = MessageConnection(channel)
        loop = channel.loop
    }

    /// Connects, authenticates both sides and greets.
    ///
    /// - Returns: the connection, and where the destination stands in this migration.
    /// - Throws: `MigrationError` with `unreachable`, `security` or `refused`.
    static func open(
        _ plan: MigrationPlan,
        credentials: any TLSCredentials,
        on loop: EventLoop
    ) async throws -> (ControlConnection, Message.Welcome) {
        let peer = Peer(plan)
        let channel = try await dial(peer, isStream: false, credentials, loop)
        let began = ContinuousClock.now
        let welcome = try await greet(.init(role: .control, migration: plan.id), peer, over: channel)
        let control = ControlConnection(channel, .now - began)
        Task(executorPreference: loop) { await control.receive() }
        Task(executorPreference: loop) { await control.ping() }
        return (control, welcome)
    }

    /// Opens a connection for one of QEMU's streams: what follows the greeting is the stream.
    ///
    /// - Parameter dialled: a connection that was begun already, to be used if it is still good.
    static func openStream(
        _ plan: MigrationPlan,
        index: Int,
        lane: Message.Hello.Lane? = nil,
        dialled: TLSChannel? = nil,
        credentials: any TLSCredentials,
        on loop: EventLoop
    ) async throws -> TLSChannel {
        let hello = Message.Hello(role: .stream, migration: plan.id, index: index, lane: lane)
        if let dialled {
            do {
                _ = try await greet(hello, Peer(plan), over: dialled)
                return dialled
            } catch let error as MigrationError where error.code != .unreachable { throw error } catch {}
        }
        return try await greet(Peer(plan), hello, credentials, loop).0
    }

    /// Begins a connection for one of QEMU's streams: nothing is said on it before it is needed.
    static func dialStream(
        _ plan: MigrationPlan,
        credentials: any TLSCredentials,
        on loop: EventLoop
    ) async throws -> TLSChannel { try await dial(Peer(plan), isStream: true, credentials, loop) }

    /// Opens a connection on which the destination tells what it has of a disk.
    static func openSeed(
        _ plan: MigrationPlan,
        index: Int,
        credentials: any TLSCredentials,
        on loop: EventLoop
    ) async throws -> MessageConnection {
        let hello = Message.Hello(role: .seed, migration: plan.id, index: index)
        return MessageConnection(try await greet(Peer(plan), hello, credentials, loop).0)
    }

    /// An agent that is connected to.
    struct Peer: Sendable {
        /// The host, for which its certificate must be.
        var host: String
        /// Its control port.
        var port: UInt16
        /// Who it must prove to be besides; nil for anybody whom the credentials trust.
        var identity: String?

        var address: SocketAddress { .inet(host: host, port: port) }
    }

    /// Connects to an agent, authenticates both sides and greets.
    ///
    /// - Throws: `MigrationError` with `unreachable`, `security` or `refused`.
    static func greet(
        _ peer: Peer,
        _ hello: Message.Hello,
        _ credentials: any TLSCredentials,
        _ loop: EventLoop
    ) async throws -> (TLSChannel, Message.Welcome) {
        let channel = try await dial(peer, isStream: hello.role == .stream, credentials, loop)
        return (channel, try await greet(hello, peer, over: channel))
    }

    /// Connects to an agent, and authenticates both sides.
    private static func dial(
        _ peer: Peer,
        isStream: Bool,
        _ credentials: any TLSCredentials,
        _ loop: EventLoop
    ) async throws -> TLSChannel {
        let socket: SocketChannel
        do {
            socket = try await SocketChannel.connect(to: peer.address, on: loop)
        } catch {
            // A host that is not known is no question of what runs there.
            let isUnknown = (error as? ChannelError)?.code == .unresolved
            let advice =
                isUnknown
                ? "see that its name is written as in DNS or /etc/hosts; 'getent hosts \(peer.host)' asks as Crossdock does"
                : "see that 'crossdock destination' runs on \(peer.host), on port \(peer.port)"
            throw MigrationError(.unreachable, "\(error); \(advice)")
        }
        if isStream { socket.limitUnsent(256 << 10) }
        return try await explained(peer, closing: socket) {
            let channel = try await TLSChannel.handshake(over: socket, credentials: credentials, hostname: peer.host)
            if let identity = peer.identity, channel.session.peer.name != identity {
                throw CredentialError(
                    "\(peer.address) proved to be '\(channel.session.peer.name.shown(most: 500))', and only '\(identity)' is meant"
                )
            }
            return channel
        }
    }

    private static func greet(
        _ hello: Message.Hello,
        _ peer: Peer,
        over channel: TLSChannel
    ) async throws -> Message.Welcome {
        try await explained(peer, closing: channel) {
            let connection = MessageConnection(channel)
            return try await channel.withDeadline(.seconds(10), for: "The greeting") {
                try await connection.send(.hello(hello))
                switch try await connection.receiveMessage() {
                case .welcome(let welcome) where welcome.version == 1: return welcome
                case .abort(let reason):
                    throw MigrationError(.refused, "The destination \(peer.host) refused: \(reason)")
                default:
                    throw ChannelError(
                        .protocolViolation,
                        "\(peer.address) does not speak Crossdock's handshake protocol"
                    )
                }
            }
        }
    }

    /// Runs a step of making a connection, which is closed when it fails.
    private static func explained<T>(
        _ peer: Peer,
        closing channel: any Channel,
        _ body: () async throws -> T
    ) async throws -> T {
        do { return try await body() } catch let error as ChannelError {
            channel.close()
            switch error.code {
            case .tls: throw MigrationError(.security, error.message)
            case .closed, .truncated, .timedOut, .protocolViolation:
                throw MigrationError(
                    .unreachable,
                    "\(error.message); what listens at \(peer.address) does not answer as a destination agent does: check the port, and how the agent is there"
                )
            default: throw MigrationError(.unreachable, error.message)
            }
        } catch let error as CredentialError {
            channel.close()
            throw MigrationError(.security, error.message)
        } catch {
            channel.close()
            throw error
        }
    }

    /// How many messages of the destination may wait: it is asked one thing at a time.
    private static let mostUnread = 8

    private func receive() async {
        do {
            while true {
                let message = try await connection.receiveMessage()
                lastHeard = .now
                switch message {
                case .pong: continue
                case .readBack(let readBack): onReadBack?(readBack)
                case .abort(let reason):
                    inbox.append((message, lastHeard))
                    lastWords = reason
                    fail(MigrationError(.failed, "The destination gave up: \(reason)"))
                    return
                default:
                    guard inbox.count < Self.mostUnread else {
                        return fail(
                            MigrationError(
                                .failed,
                                "The destination says more than it was asked: \(Self.mostUnread) messages wait"
                            )
                        )
                    }
                    inbox.append((message, lastHeard))
                    arrived.signal()
                }
            }
        } catch {
            fail(MigrationError(.failed, "The connection to the destination was lost: \(error)"), isLost: true)
        }
    }

    private func ping() async {
        while failure == nil {
            await loop.sleep(for: Self.pingInterval)
            if failure != nil { return }
            if !isPinging {
                // A send may wait for a link that is dead; the judgement below must not wait with it.
                isPinging = true
                Task(executorPreference: loop) {
                    try? await self.connection.send(.ping)
                    self.isPinging = false
                }
            }
            if ContinuousClock.now - lastHeard > Self.patience {
                fail(MigrationError(.failed, "The destination has been silent for \(Self.patience)"), isLost: true)
            }
        }
    }

    private func fail(_ error: MigrationError, isLost: Bool = false) {
        guard failure == nil else { return }
        failure = error
        self.isLost = isLost
        connection.close()
        arrived.signal()
        onFailure?(error)
        onFailure = nil
    }

    func send(_ message: Message) async throws {
        if let failure { throw failure }
        do {
            try await connection.send(message)
        } catch {
            // What the destination said last may still be read, and says more.
            let timer = loop.schedule(after: .milliseconds(500)) {
                self.fail(MigrationError(.failed, "The connection to the destination was lost: \(error)"), isLost: true)
            }
            defer { timer.cancel() }
            while failure == nil { await arrived.wait() }
            throw failure ?? MigrationError(.failed, "\(error)")
        }
    }

    func send(data: [UInt8]) async throws { try await connection.send(data: data) }

    /// The next message that is no answer to a ping.
    func next(timeout: Duration) async throws -> Message {
        let timer = loop.schedule(after: timeout) {
            self.fail(MigrationError(.failed, "The destination did not answer within \(timeout)"), isLost: true)
        }
        defer { timer.cancel() }
        while inbox.isEmpty {
            if let failure { throw failure }
            if let interruption { throw interruption }
            await arrived.wait()
        }
        let next = inbox.removeFirst()
        arrival = next.at
        return next.message
    }

    /// Sends a message and waits for the answer.
    ///
    /// - Throws: also when something was said already that nobody asked for, which would be taken for the answer: no word of such a destination
    ///   can be trusted any more.
    func ask(_ message: Message, timeout: Duration) async throws -> Message {
        if asked == 0, let early = inbox.first {
            fail(MigrationError(.failed, "The destination said \(early.message.name) before it was asked for anything"))
        }
        asked += 1
        defer { asked -= 1 }
        try await send(message)
        return try await next(timeout: timeout)
    }

    /// Ends the connection as TLS has it, so that nobody takes it for one that was cut.
    func end() async {
        try? await connection.channel.finishWriting()
        close()
    }

    func close() {
        onFailure = nil
        fail(MigrationError(.failed, "The connection to the destination was closed"))
    }
}

extension ControlConnection.Peer {
    /// The destination of a migration.
    init(_ plan: MigrationPlan) { self.init(host: plan.host, port: plan.port, identity: plan.identity) }
}
