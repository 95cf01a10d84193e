public import Glibc

/// A growing piece of memory with a position: what is written can be read again after `seek`. QEMU's QIOChannelBuffer.
public final class BufferChannel: Channel, @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// The loop.
    public let loop: EventLoop
    /// The position can be changed.
    public let features: ChannelFeatures = [.seekable, .halfClose]
    /// "buffer".
    public let peerName = "buffer"
    /// The contents.
    public private(set) var contents: [UInt8]
    /// Where the next read or write begins, in bytes.
    public private(set) var position = 0
    private let limit: Int
    private var failure: ChannelError?

    /// Makes a buffer.
    ///
    /// - Parameters:
    ///   - contents: what can be read at first.
    ///   - limit: how many bytes it may grow to; a write beyond is an error.
    ///   - loop: the loop.
    public init(_ contents: [UInt8] = [], limit: Int = 1 << 30, on loop: EventLoop) {
        self.contents = contents
        self.limit = limit
        self.loop = loop
    }

    /// Moves the position, which may be at most the number of bytes.
    public func seek(to position: Int) throws {
        guard (0...contents.count).contains(position) else {
            throw ChannelError(
                .protocolViolation,
                "Position \(position) is outside the buffer of \(contents.count) bytes"
            )
        }
        self.position = position
    }

    /// Reads from the position; the end of the contents is the end of the stream.
    public func read(into buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        if let failure { throw failure }
        var total = 0
        for buffer in buffers {
            let count = min(buffer.iov_len, contents.count - position)
            if count == 0 { break }
            contents.withUnsafeBytes { _ = memcpy(buffer.iov_base, $0.baseAddress! + position, count) }
            position += count
            total += count
        }
        return total
    }

    /// Writes at the position, over what is there and beyond.
    public func write(from buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        if let failure { throw failure }
        let total = buffers.reduce(0) { $0 + $1.iov_len }
        guard position + total <= limit else {
            throw ChannelError(.system, "The buffer is full: it takes \(limit) bytes", number: ENOSPC)
        }
        for buffer in buffers where buffer.iov_len > 0 {
            let bytes = UnsafeRawBufferPointer(start: buffer.iov_base, count: buffer.iov_len)
            let overlap = min(bytes.count, contents.count - position)
            contents.replaceSubrange(position..<(position + overlap), with: bytes)
            position += bytes.count
        }
        return total
    }

    /// Nothing is held back.
    public func flush() throws -> Bool {
        if let failure { throw failure }
        return true
    }

    /// Returns at once.
    public func waitReadable() async throws { if let failure { throw failure } }
    /// Returns at once.
    public func waitWritable() async throws { if let failure { throw failure } }
    /// Nothing happens.
    public func finishWriting() async throws { if let failure { throw failure } }
    /// See `Channel.abort(_:)`.
    public func abort(_ reason: ChannelError) { loop.execute { self.failure = self.failure ?? reason } }
    /// Further calls fail.
    public func close() { failure = failure ?? ChannelError(.closed, "The buffer is closed") }
}
