public import IO

/// Cuts a channel's bytes into lines.
public final class LineReader: @unchecked Sendable {
    // Unchecked: confined to the channel's loop.
    private let channel: any Channel
    private let limit: Int
    private let buffer = IOBuffer(capacity: 64 << 10)
    private var rest: [UInt8] = []
    private var scanned = 0

    /// Makes a reader.
    ///
    /// - Parameters:
    ///   - channel: where the bytes come from.
    ///   - limit: how long a line may be; a longer one is an error.
    public init(_ channel: any Channel, limit: Int) {
        self.channel = channel
        self.limit = limit
    }

    /// The next line without its end; nil at the end of the stream.
    public func next() async throws -> [UInt8]? {
        while true {
            if let end = rest[scanned...].firstIndex(of: UInt8(ascii: "\n")) {
                var line = Array(rest[..<end])
                if line.last == UInt8(ascii: "\r") { line.removeLast() }
                rest.removeSubrange(...end)
                scanned = 0
                return line
            }
            scanned = rest.count
            guard rest.count <= limit else {
                throw ChannelError(.protocolViolation, "\(channel.peerName) sent a line of more than \(limit) bytes")
            }
            let count = try await channel.readSome(into: buffer.mutable(0..<buffer.capacity))
            if count == 0 { return nil }
            rest.append(contentsOf: buffer.bytes(0..<count))
        }
    }
}
