internal import Glibc
internal import IO
internal import TLS

/// What is said between a host that waits with a token and one that joins: orders one way, answers the other, after a handshake that only who has
/// the secret can finish.
final class JoinLink: Sendable {
    /// One message, JSON behind its length.
    enum Message: Codable {
        /// Do this.
        case order(MemberOrder)
        /// That is what came of it.
        case answer(MemberAnswer)
        /// Not with you, a sentence without a full stop.
        case refused(String)
    }

    /// Who has the secret, for TLS.
    static let user = "crossdock-join"
    private static let limit = 1 << 20
    /// How long an order may take: a proof measures for some seconds, a service starts.
    private static let patience = Duration.seconds(120)

    private let channel: TLSChannel

    /// Takes over a channel whose handshake is done.
    init(_ channel: TLSChannel) { self.channel = channel }

    /// Who is at the other end.
    var peerAddress: String? { channel.peerAddress?.host }
    /// At which address the other end sees this host.
    var localAddress: String? { channel.localAddress?.host }

    /// Sends a message. Called on the channel's loop.
    func send(_ message: Message) async throws {
        let body = try JSONText.encode(message)
        let head = (0..<4).map { UInt8(truncatingIfNeeded: body.count >> (24 - 8 * $0)) }
        try await channel.withDeadline(.seconds(20), for: "Sending") { try await channel.write(head + body) }
    }

    /// Waits for a message; nil when the other end has closed the connection. Called on the channel's loop.
    func receive() async throws -> Message {
        try await channel.withDeadline(Self.patience, for: "Waiting for a message") {
            let head = try await channel.read(exactly: 4)
            let count = head.reduce(0) { $0 << 8 | Int($1) }
            guard count <= Self.limit else { throw FleetError("A message of \(count) bytes is too long") }
            guard let message = JSONText.decode(Message.self, from: try await channel.read(exactly: count)) else {
                throw FleetError("The other host does not speak as this one does; install the same release on both")
            }
            return message
        }
    }

    /// Has the host at the other end carry out an order. Blocks: not on a loop.
    ///
    /// - Throws: `FleetError` when the connection is lost.
    func carryOut(_ order: MemberOrder) throws -> MemberAnswer {
        let outcome = Waiting<MemberAnswer>()
        Task(executorPreference: channel.loop) {
            do {
                try await self.send(.order(order))
                guard case .answer(let answer) = try await self.receive() else {
                    throw FleetError("The other host does not answer")
                }
                outcome.set(.success(answer))
            } catch { outcome.set(.failure(FleetError("The connection was lost: \(error)"))) }
        }
        return try outcome.wait().get()
    }

    /// Ends the connection. Called on the channel's loop.
    func close() { channel.close() }
}

/// A result that a thread waits for.
private final class Waiting<Value: Sendable>: @unchecked Sendable {
    // Unchecked: written before the semaphore is raised, read after it was waited for.
    private let semaphore = UnsafeMutablePointer<sem_t>.allocate(capacity: 1)
    private var result: Result<Value, any Error>?

    init() { sem_init(semaphore, 0, 0) }

    deinit {
        sem_destroy(semaphore)
        semaphore.deallocate()
    }

    func set(_ result: Result<Value, any Error>) {
        self.result = result
        sem_post(semaphore)
    }

    func wait() -> Result<Value, any Error> {
        while sem_wait(semaphore) != 0, errno == EINTR {}
        return result ?? .failure(FleetError("Nothing came of it"))
    }
}
