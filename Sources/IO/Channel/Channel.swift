public import Glibc

/// What a channel can do beyond moving bytes.
public struct ChannelFeatures: OptionSet, Sendable {
    /// The bits.
    public let rawValue: UInt32
    /// Makes a set from bits.
    public init(rawValue: UInt32) { self.rawValue = rawValue }
    /// One direction can be shut while the other goes on.
    public static let halfClose = ChannelFeatures(rawValue: 1 << 0)
    /// The bytes are encrypted and the peer is authenticated.
    public static let secure = ChannelFeatures(rawValue: 1 << 1)
    /// Bytes may be held back until `flush`.
    public static let buffersWrites = ChannelFeatures(rawValue: 1 << 2)
    /// Open files can travel with the bytes: see `SocketChannel.write(_:passing:)`.
    public static let passesDescriptors = ChannelFeatures(rawValue: 1 << 3)
    /// The position in the stream can be changed.
    public static let seekable = ChannelFeatures(rawValue: 1 << 4)
}

/// A stream of bytes in both directions, whatever carries it: a socket, TLS, memory.
///
/// The core calls are synchronous and never block; the async layer in `Channel+Async.swift` retries them after
/// readiness. A channel is confined to the loop it was made on: only `abort` may be called from elsewhere. At most one
/// task reads and one task writes at a time.
public protocol Channel: AnyObject, Sendable {
    /// The loop that the channel is confined to.
    var loop: EventLoop { get }
    /// What the channel can do.
    var features: ChannelFeatures { get }
    /// The peer, for messages: an address, a path.
    var peerName: String { get }

    /// Reads what is there, into the buffers in their order.
    ///
    /// - Returns: the number of bytes; 0 at the orderly end of the stream; nil when nothing is there yet.
    func read(into buffers: UnsafeBufferPointer<iovec>) throws -> Int?

    /// Takes as many bytes as it can, from the buffers in their order.
    ///
    /// - Returns: the number of bytes taken, or nil when none can be taken yet. A channel with `buffersWrites` may
    ///   hold them back until `flush`.
    func write(from buffers: UnsafeBufferPointer<iovec>) throws -> Int?

    /// Sends what is held back. Returns whether all of it went.
    func flush() throws -> Bool

    /// Suspends until a read may make progress.
    func waitReadable() async throws

    /// Suspends until a write or flush may make progress.
    func waitWritable() async throws

    /// Ends the direction to the peer in the orderly way, after all that was written; reading goes on.
    func finishWriting() async throws

    /// Fails the channel from any thread: everything that waits on it, now or later, throws `reason`.
    func abort(_ reason: ChannelError)

    /// Releases the channel's resources, without an orderly end. Further calls fail.
    func close()

    /// This end's address, when there is a socket below.
    var localAddress: SocketAddress? { get }

    /// The other end's address, when there is a socket below.
    var peerAddress: SocketAddress? { get }

    /// Holds back partial packets until it is switched off (TCP_CORK); nothing happens where there are no packets.
    func setCork(_ enabled: Bool)

    /// Lets the system delay small packets until earlier ones are acknowledged (Nagle's algorithm); off by default.
    func setDelay(_ enabled: Bool)
}

extension Channel {
    /// There is no socket below.
    public var localAddress: SocketAddress? { nil }
    /// There is no socket below.
    public var peerAddress: SocketAddress? { nil }
    /// There are no packets.
    public func setCork(_ enabled: Bool) {}
    /// There are no packets.
    public func setDelay(_ enabled: Bool) {}
}
