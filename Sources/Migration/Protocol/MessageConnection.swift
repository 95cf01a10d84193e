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
    /// How long a message may be.
    static let maximumMessage = 4 << 20
    /// How long a data frame may be.
    public static let maximumData = 256 << 10

    /// What the frames travel on.
    public let channel: any Channel
    private let writeLock = AsyncLock()

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
        case 1 where length <= Self.maximumMessage:
            let payload = try await channel.read(exactly: length)
            guard let message = JSONText.decode(Message.self, from: payload) else {
                throw ChannelError(
                    .protocolViolation,
                    "\(channel.peerName) sent a message that this version does not know"
                )
            }
            return .message(message)
        case 2 where length <= Self.maximumData: return .data(try await channel.read(exactly: length))
        default:
            throw ChannelError(.protocolViolation, "\(channel.peerName) does not speak Crossdock's handshake protocol")
        }
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
