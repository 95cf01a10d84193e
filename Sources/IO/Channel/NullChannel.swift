public import Glibc

/// A channel to nowhere: what is written vanishes, and there is nothing to read. QEMU's QIOChannelNull.
public final class NullChannel: Channel, @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// The loop.
    public let loop: EventLoop
    /// It can do nothing special.
    public let features: ChannelFeatures = [.halfClose]
    /// "null".
    public let peerName = "null"
    private var failure: ChannelError?

    /// Makes a channel to nowhere.
    public init(on loop: EventLoop) { self.loop = loop }

    /// The end of the stream, always.
    public func read(into buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        if let failure { throw failure }
        return 0
    }

    /// Takes everything.
    public func write(from buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        if let failure { throw failure }
        return buffers.reduce(0) { $0 + $1.iov_len }
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
    public func close() { failure = failure ?? ChannelError(.closed, "The null channel is closed") }
}
