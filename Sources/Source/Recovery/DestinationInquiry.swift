internal import Glibc
public import IO
public import Migration
public import TLS

/// What a destination answered, at each address of its name, when an operator wants to decide without it.
///
/// Silence is no proof that a guest does not run: it outlives its agent, and a link may be down. An answer is a proof that the host
/// is there.
public struct DestinationInquiry: Sendable, Hashable {
    /// What came back from an address.
    public enum Answer: Sendable, Hashable {
        /// Nothing: a time-out, no route.
        case silence(String)
        /// Something, but no word about the migration: a refused connection, another certificate, a destination agent that does not
        /// know the migration or this host.
        case stranger(String)
        /// A destination agent that knows the migration and has not decided.
        case undecided(DestinationState, String)
        /// A destination agent that has the guest, or will never run it.
        case decided(String)

        /// What happened there, for people.
        var sentence: String {
            switch self {
            case .silence(let text), .stranger(let text), .undecided(_, let text), .decided(let text): text
            }
        }
    }

    /// An address and its answer.
    public struct Result: Sendable, Hashable {
        /// The address.
        public let address: String
        /// The answer.
        public let answer: Answer

        /// Notes an answer.
        public init(address: String, answer: Answer) {
            self.address = address
            self.answer = answer
        }
    }

    /// The answers, in the order in which they came.
    public let results: [Result]

    /// Makes an inquiry from its answers.
    public init(_ results: [Result]) { self.results = results }

    /// Whether nothing came back from anywhere.
    public var isSilent: Bool {
        results.allSatisfy { if case .silence = $0.answer { true } else { false } }
    }

    /// Whether the destination has said what becomes of the guest.
    public var isDecided: Bool {
        results.contains { if case .decided = $0.answer { true } else { false } }
    }

    /// Every address with its answer.
    public var sentence: String { results.map { "\($0.address): \($0.answer.sentence)" }.joined(separator: "; ") }
}

extension DestinationInquiry {
    /// Asks at every address of the destination's name, one after the other, until one has decided.
    ///
    /// - Parameters:
    ///   - plan: the migration.
    ///   - release: what the destination is told that knows the migration: the guest was released to it.
    ///   - credentials: a client's.
    ///   - loop: where the connections live; called on it.
    ///   - patience: the time for each of connecting, TLS and the greeting.
    /// - Throws: `CredentialError` when these credentials cannot be used at all.
    public static func ask(
        _ plan: MigrationPlan,
        release: Message.Release = .init(),
        credentials: any TLSCredentials,
        on loop: EventLoop,
        patience: Duration = .seconds(10)
    ) async throws -> DestinationInquiry {
        let addresses: [SocketAddress]
        do { addresses = try await plan.address.resolved() } catch let error as ChannelError {
            return .init([.init(address: "\(plan.address)", answer: .silence(error.message))])
        }
        var results: [Result] = []
        for address in addresses {
            let inquirer = Inquirer(
                plan: plan,
                address: address,
                release: release,
                credentials: credentials,
                loop: loop,
                patience: patience
            )
            results.append(.init(address: "\(address)", answer: try await inquirer.ask()))
            if case .decided = results.last?.answer { break }
        }
        return .init(results)
    }
}

/// The conversation with one address.
private struct Inquirer {
    let plan: MigrationPlan
    let address: SocketAddress
    let release: Message.Release
    let credentials: any TLSCredentials
    let loop: EventLoop
    let patience: Duration

    /// Errors of a connection that say that nothing of the other host came back.
    private static let silences: Set<Int32> = [
        ETIMEDOUT, EHOSTUNREACH, ENETUNREACH, EHOSTDOWN, ENETDOWN, EADDRNOTAVAIL, EAFNOSUPPORT, EACCES, EPERM,
    ]

    func ask() async throws -> DestinationInquiry.Answer {
        let socket: SocketChannel
        do {
            socket = try await SocketChannel.connect(to: address, on: loop, timeout: patience)
        } catch let error as ChannelError {
            let isSilence = error.code == .timedOut || error.number.map(Self.silences.contains) == true
            return isSilence ? .silence(error.message) : .stranger(error.message)
        }
        defer { socket.close() }
        let channel: TLSChannel
        do {
            channel = try await TLSChannel.handshake(
                over: socket,
                credentials: credentials,
                hostname: plan.host,
                timeout: patience
            )
        } catch let error as ChannelError where error.code == .timedOut {
            // Its kernel is up, and QEMU may be too, whatever has become of the agent.
            return .stranger("the connection was taken, and then nothing came: \(error.message)")
        } catch let error as ChannelError {
            return .stranger(error.message)
        }
        do { return try await greet(MessageConnection(channel)) } catch let error as ChannelError {
            return .stranger("it has proved who it is, and then: \(error.message)")
        }
    }

    private func greet(_ connection: MessageConnection) async throws -> DestinationInquiry.Answer {
        let first = try await connection.channel.withDeadline(patience, for: "The greeting") {
            try await connection.send(.hello(.init(role: .control, migration: plan.id)))
            return try await connection.receiveMessage()
        }
        switch first {
        case .abort(let reason): return .stranger("the destination agent refuses: \(reason)")
        case .welcome(let welcome) where welcome.version == 1:
            if welcome.state == .new {
                return .stranger("the destination agent does not know migration \(plan.id)")
            }
            return await decision(of: welcome.state, connection)
        default: return .stranger("it does not speak Crossdock's handshake protocol")
        }
    }

    /// It knows the migration, so it is for it to say.
    private func decision(
        of state: DestinationState,
        _ connection: MessageConnection
    ) async -> DestinationInquiry.Answer {
        let words = "the destination agent knows the migration, in the state '\(state.rawValue)'"
        do {
            return try await connection.channel.withDeadline(.seconds(60), for: "RELEASE") {
                try await connection.send(.release(release))
                while true {
                    switch try await connection.receiveMessage() {
                    case .owned: return .decided("it has the guest")
                    case .refused(let reason): return .decided("it will never run the guest: \(reason)")
                    case .abort(let reason): return .undecided(state, "\(words), and gave up: \(reason)")
                    default: continue
                    }
                }
            }
        } catch { return .undecided(state, "\(words), and has not decided: \(error)") }
    }
}
