public import Glibc

/// One end of a pair of channels that are connected through memory, both on one loop.
///
/// Tests use pairs to run protocols without sockets; a pair behaves as a connected pair of sockets does: a bounded
/// buffer in each direction, half-close, and an error for who writes to a closed peer.
public final class MemoryChannel: Channel, @unchecked Sendable {
    // Unchecked: confined to the loop.
    private final class Pipe {
        let bytes: ByteFIFO
        let limit: Int
        var finished = false
        var reader: UnsafeContinuation<Void, Never>?
        var writer: UnsafeContinuation<Void, Never>?

        init(limit: Int) {
            self.limit = limit
            bytes = ByteFIFO(capacity: limit)
        }

        func wake() {
            reader.take()?.resume()
            writer.take()?.resume()
        }
    }

    /// The loop of both ends.
    public let loop: EventLoop
    /// A pair can be half-closed.
    public let features: ChannelFeatures = [.halfClose]
    /// The name of the other end.
    public let peerName: String
    private let incoming: Pipe
    private let outgoing: Pipe
    private var failure: ChannelError?

    private init(loop: EventLoop, peerName: String, incoming: Pipe, outgoing: Pipe) {
        self.loop = loop
        self.peerName = peerName
        self.incoming = incoming
        self.outgoing = outgoing
    }

    /// Makes a connected pair.
    ///
    /// - Parameters:
    ///   - loop: the loop of both ends.
    ///   - capacity: how many bytes may be under way in each direction.
    public static func pair(on loop: EventLoop, capacity: Int = 64 << 10) -> (MemoryChannel, MemoryChannel) {
        let forth = Pipe(limit: capacity)
        let back = Pipe(limit: capacity)
        return (
            MemoryChannel(loop: loop, peerName: "memory:b", incoming: back, outgoing: forth),
            MemoryChannel(loop: loop, peerName: "memory:a", incoming: forth, outgoing: back)
        )
    }

    /// See `Channel.read(into:)`.
    public func read(into buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        if let failure { throw failure }
        if incoming.bytes.isEmpty { return incoming.finished ? 0 : nil }
        var total = 0
        for buffer in buffers {
            let count = min(buffer.iov_len, incoming.bytes.count)
            if count == 0 { break }
            memcpy(buffer.iov_base, incoming.bytes.bytes.baseAddress!, count)
            incoming.bytes.remove(count)
            total += count
        }
        incoming.writer.take()?.resume()
        return total
    }

    /// See `Channel.write(from:)`.
    public func write(from buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        if let failure { throw failure }
        if outgoing.finished { throw ChannelError.system("write to \(peerName)", EPIPE) }
        var total = 0
        for buffer in buffers {
            let count = min(buffer.iov_len, outgoing.limit - outgoing.bytes.count)
            if count == 0 { break }
            outgoing.bytes.append(UnsafeRawBufferPointer(start: buffer.iov_base, count: count))
            total += count
        }
        if total == 0 { return nil }
        outgoing.reader.take()?.resume()
        return total
    }

    /// Nothing is held back.
    public func flush() throws -> Bool {
        if let failure { throw failure }
        return true
    }

    /// See `Channel.waitReadable()`.
    public func waitReadable() async throws {
        if failure == nil, incoming.bytes.isEmpty, !incoming.finished {
            precondition(incoming.reader == nil, "one task at a time reads from a channel")
            await withUnsafeContinuation { incoming.reader = $0 }
        }
        if let failure { throw failure }
    }

    /// See `Channel.waitWritable()`.
    public func waitWritable() async throws {
        if failure == nil, outgoing.bytes.count >= outgoing.limit, !outgoing.finished {
            precondition(outgoing.writer == nil, "one task at a time writes to a channel")
            await withUnsafeContinuation { outgoing.writer = $0 }
        }
        if let failure { throw failure }
    }

    /// Ends the outgoing direction.
    public func finishWriting() async throws {
        if let failure { throw failure }
        outgoing.finished = true
        outgoing.wake()
    }

    /// See `Channel.abort(_:)`.
    public func abort(_ reason: ChannelError) {
        loop.execute { self.end(reason) }
    }

    /// Ends both directions.
    public func close() { end(ChannelError(.closed, "The channel to \(peerName) is closed")) }

    private func end(_ reason: ChannelError) {
        guard failure == nil else { return }
        failure = reason
        incoming.finished = true
        outgoing.finished = true
        incoming.wake()
        outgoing.wake()
    }
}
