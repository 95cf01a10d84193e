public import Glibc

/// Reads ahead and gathers small writes, over a channel that does neither: one system call then serves many small
/// messages. Long reads and writes go past the buffers.
///
/// What was read ahead is lost to anybody who goes on with the channel below.
public final class BufferedChannel: Channel, @unchecked Sendable {
    // Unchecked: confined to the loop of the channel below.
    private static let size = 64 << 10
    /// What is at least as long as this is not copied.
    private static let direct = 16 << 10

    private let base: any Channel
    private let incoming = ByteFIFO(capacity: size)
    private let outgoing = ByteFIFO(capacity: size)
    private var ended = false

    /// Makes a channel over another, which belongs to it from here on.
    public init(over base: any Channel) { self.base = base }

    /// The loop of the channel below.
    public var loop: EventLoop { base.loop }
    /// Those of the channel below, and that it holds writes back.
    public var features: ChannelFeatures { base.features.subtracting(.passesDescriptors).union(.buffersWrites) }
    /// The peer of the channel below.
    public var peerName: String { base.peerName }
    /// The address below.
    public var localAddress: SocketAddress? { base.localAddress }
    /// The peer's address below.
    public var peerAddress: SocketAddress? { base.peerAddress }
    /// Passed on to the channel below.
    public func setCork(_ enabled: Bool) { base.setCork(enabled) }
    /// Passed on to the channel below.
    public func setDelay(_ enabled: Bool) { base.setDelay(enabled) }

    /// See `Channel.read(into:)`.
    public func read(into buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        if incoming.isEmpty {
            var wanted = 0
            for buffer in buffers { wanted += buffer.iov_len }
            if ended || wanted == 0 { return 0 }
            if wanted >= Self.direct { return try base.read(into: buffers) }
            guard let count = try base.readNow(into: incoming.space(Self.size)) else { return nil }
            if count == 0 {
                ended = true
                return 0
            }
            incoming.append(count: count)
        }
        var total = 0
        for buffer in buffers {
            let count = min(buffer.iov_len, incoming.count)
            if count == 0 { continue }
            memcpy(buffer.iov_base, incoming.bytes.baseAddress!, count)
            incoming.remove(count)
            total += count
        }
        return total
    }

    /// See `Channel.write(from:)`.
    public func write(from buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        var total = 0
        for buffer in buffers { total += buffer.iov_len }
        if outgoing.free < total || total >= Self.direct {
            return try outgoing.isEmpty ? base.write(from: buffers) : writeBehind(buffers)
        }
        for buffer in buffers {
            outgoing.append(UnsafeRawBufferPointer(start: buffer.iov_base, count: buffer.iov_len))
        }
        return total
    }

    /// Sends what was gathered and the buffers with one call.
    private func writeBehind(_ buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        let count = min(buffers.count, 15)
        while !outgoing.isEmpty {
            let gathered = outgoing.count
            let sent = try withUnsafeTemporaryAllocation(of: iovec.self, capacity: count + 1) { vectors in
                vectors[0] = iovec(
                    iov_base: UnsafeMutableRawPointer(mutating: outgoing.bytes.baseAddress),
                    iov_len: gathered
                )
                for index in 0..<count { vectors[index + 1] = buffers[index] }
                return try base.write(from: UnsafeBufferPointer(rebasing: vectors[0...count]))
            }
            guard let sent else { return nil }
            outgoing.remove(min(sent, gathered))
            if sent > gathered { return sent - gathered }
        }
        return try base.write(from: buffers)
    }

    /// Sends what was gathered.
    public func flush() throws -> Bool { try base.drain(outgoing) }

    /// See `Channel.waitReadable()`.
    public func waitReadable() async throws { if incoming.isEmpty { try await base.waitReadable() } }

    /// See `Channel.waitWritable()`.
    public func waitWritable() async throws { try await base.waitWritable() }

    /// Ends the direction to the peer after what was gathered.
    public func finishWriting() async throws {
        try await flushAll()
        try await base.finishWriting()
    }

    /// See `Channel.abort(_:)`.
    public func abort(_ reason: ChannelError) { base.abort(reason) }

    /// Closes the channel below; what was gathered and not flushed is dropped.
    public func close() { base.close() }
}
