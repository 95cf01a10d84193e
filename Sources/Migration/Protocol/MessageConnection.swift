internal import Emulator
public import IO

/// Frames on a channel: a length of four bytes, a kind of one byte, the payload. Kind 1 is a JSON message, kind 2 data.
public final class MessageConnection: @unchecked Sendable {
    // Unchecked: confined to the channel's loop.

    /// What a frame carries.
    public enum Frame {
        /// A message.
        case message(Message)
        /// A piece of a file.
        case data([UInt8])
    }

    /// The port of destination agents.
    public static let port: UInt16 = 10808
    /// How long a message may be, in bytes.
    public static let maximumMessage = 4 << 20
    /// Longer messages, in bytes, are decoded on a thread of their own: a list takes about 2 µs for each number in it.
    static let decodedAtOnce = 4 << 10
    /// Longer messages, in bytes, are received one after the other where a turn is taken for them.
    static let receivedAtOnce = 64 << 10
    /// How long a data frame may be.
    public static let maximumData = 256 << 10

    /// What the frames travel on.
    public let channel: any Channel
    private let writeLock = AsyncLock()
    /// How long a message may be that is received, in bytes.
    public var limit = MessageConnection.maximumMessage
    /// The bytes of the message that was received last.
    public private(set) var messageBytes = 0
    /// Whose turn it is to receive a long message: nothing is kept of one before that.
    public var turns: Turns?

    /// Who waits for whom with long messages.
    public struct Turns: Sendable {
        let semaphore: KeyedSemaphore
        let key: String
        let deadline: Duration

        /// Makes turns.
        ///
        /// - Parameters:
        ///   - semaphore: how many messages are received at once for each key.
        ///   - key: whose messages these are.
        ///   - deadline: how long one may take, once it is its turn.
        public init(_ semaphore: KeyedSemaphore, key: String, deadline: Duration) {
            self.semaphore = semaphore
            self.key = key
            self.deadline = deadline
        }
    }

    /// Makes a connection on a channel.
    public init(_ channel: any Channel) { self.channel = channel }

    /// Sends a message.
    public func send(_ message: Message) async throws {
        let payload = try JSONText.encode(message)
        guard payload.count <= Self.maximumMessage else {
            throw ChannelError(.protocolViolation, "The message \(message.name) is larger than 4 MiB")
        }
        try await send(kind: 1, payload)
    }

    /// Sends a piece of a file.
    public func send(data: [UInt8]) async throws { try await send(kind: 2, data) }

    private func send(kind: UInt8, _ payload: [UInt8]) async throws {
        let length = UInt32(payload.count)
        let header: [UInt8] = [24, 16, 8, 0].map { UInt8(truncatingIfNeeded: length >> $0) } + [kind]
        await writeLock.acquire()
        defer { writeLock.release() }
        try await channel.write(header + payload)
    }

    /// The next frame.
    ///
    /// - Throws: `ChannelError` with `Code.closed` at the end, `Code.protocolViolation` for what is no frame.
    public func receive() async throws -> Frame {
        let header = try await channel.read(exactly: 5)
        let length = header[..<4].reduce(0) { $0 << 8 | Int($1) }
        switch header[4] {
        case 1 where length <= limit: return .message(try await receive(length))
        case 1 where length <= Self.maximumMessage:
            throw ChannelError(
                .protocolViolation,
                "\(channel.peerName) sent a message of \(length) bytes where the limit is \(limit) bytes"
            )
        case 2 where length <= Self.maximumData: return .data(try await channel.read(exactly: length))
        default:
            throw ChannelError(.protocolViolation, "\(channel.peerName) does not speak Crossdock's handshake protocol")
        }
    }

    private func receive(_ length: Int) async throws -> Message {
        guard let turns, length > Self.receivedAtOnce else { return try await readMessage(length) }
        let turn = turns.semaphore.request(turns.key)
        defer { turn.end() }
        try await turn.wait()
        return try await channel.withDeadline(turns.deadline, for: "A message of \(length) bytes") {
            try await self.readMessage(length)
        }
    }

    private func readMessage(_ length: Int) async throws -> Message {
        let payload = try await channel.read(exactly: length)
        messageBytes = length
        let message =
            length > Self.decodedAtOnce
            ? await BlockingPool.decoding.value { JSONText.decode(Message.self, from: payload) }
            : JSONText.decode(Message.self, from: payload)
        guard let message else {
            throw ChannelError(
                .protocolViolation,
                "\(channel.peerName) sent a message that this version does not know"
            )
        }
        return message
    }

    /// The next frame, which must be a message.
    public func receiveMessage() async throws -> Message {
        guard case .message(let message) = try await receive() else {
            throw ChannelError(.protocolViolation, "\(channel.peerName) sent data where a message was due")
        }
        return message
    }

    /// Closes the channel.
    public func close() { channel.close() }
}
