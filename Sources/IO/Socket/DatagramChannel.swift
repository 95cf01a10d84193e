internal import CLinux
internal import Glibc

/// A UDP socket: messages with boundaries, which may be lost or change places. QEMU's QIOChannelSocket for datagrams.
public final class DatagramChannel: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// The loop.
    public let loop: EventLoop
    private var fd: Int32
    private let registration: Registration
    private var failure: ChannelError?
    private let isConnected: Bool
    /// MSG_TRUNC: the length of the whole message is returned, also when it does not fit.
    private static let reportsLength: Int32 = 0x20

    private init(_ fd: Int32, isConnected: Bool, on loop: EventLoop) throws {
        self.fd = fd
        self.isConnected = isConnected
        self.loop = loop
        do { registration = try loop.register(fd) } catch {
            Glibc.close(fd)
            throw error
        }
    }

    deinit {
        let (fd, loop) = (fd, loop)
        guard fd >= 0 else { return }
        loop.execute {
            loop.deregister(fd)
            Glibc.close(fd)
        }
    }

    /// Opens a socket. Called on the loop.
    ///
    /// - Parameters:
    ///   - local: where to receive; port 0 lets the system choose.
    ///   - remote: the one peer to exchange messages with; without it each message has its own.
    ///   - loop: the loop.
    public static func open(
        local: SocketAddress,
        remote: SocketAddress? = nil,
        on loop: EventLoop
    ) async throws -> DatagramChannel {
        let locals = try await resolve(local, passive: true)
        var remotes: [RawAddress]?
        if let remote { remotes = try await resolve(remote, passive: false) }
        var last = ChannelError(
            .unresolved,
            "\(local) and \(remote.map { "\($0)" } ?? "nobody") have no family in common"
        )
        for candidate in locals {
            let peer = remotes?.first { $0.family == candidate.family }
            if remotes != nil, peer == nil { continue }
            let fd = xd_socket(candidate.family, Int32(SOCK_DGRAM.rawValue))
            guard fd >= 0 else { continue }
            if candidate.withPointer({ Glibc.bind(fd, $0, $1) }) != 0 {
                last = ChannelError.system("receive datagrams on \(local)", errno)
            } else if let peer, peer.withPointer({ Glibc.connect(fd, $0, $1) }) != 0 {
                last = ChannelError.system("send datagrams to \(remote!)", errno)
            } else {
                return try DatagramChannel(fd, isConnected: peer != nil, on: loop)
            }
            Glibc.close(fd)
        }
        throw last
    }

    private static func resolve(_ address: SocketAddress, passive: Bool) async throws -> [RawAddress] {
        guard case .inet(let host, let port) = address else {
            throw ChannelError(.unresolved, "Datagrams need an Internet address, not \(address)")
        }
        return try await BlockingPool.shared.run {
            try RawAddress.resolve(host: host, port: port, passive: passive)
        }
    }

    /// The address that messages are received on.
    public var localAddress: SocketAddress { RawAddress.of(fd, peer: false) }

    /// Sends one message.
    ///
    /// - Parameters:
    ///   - message: its bytes; none at all is a message too.
    ///   - address: a numeric address, as `receive` reports it; nil for the peer of a connected socket.
    /// - Throws: `ChannelError`; an earlier message that nobody received may show here as "connection refused".
    public func send(_ message: [UInt8], to address: SocketAddress? = nil) async throws {
        var target: RawAddress?
        if let address {
            guard !isConnected else {
                throw ChannelError(.protocolViolation, "This socket has one peer; a message cannot go to \(address)")
            }
            guard case .inet(let host, let port) = address else {
                throw ChannelError(.unresolved, "Datagrams need an Internet address, not \(address)")
            }
            let family = RawAddress.of(fd, peer: false).host?.contains(":") == true ? AF_INET6 : AF_INET
            let found = try await BlockingPool.shared.run {
                try RawAddress.resolve(host: host, port: port, passive: false)
            }
            target = found.first { $0.family == family } ?? found.first
        }
        while true {
            if let failure { throw failure }
            let count =
                if let target {
                    target.withPointer { pointer, length in
                        message.withUnsafeBytes { sendto(fd, $0.baseAddress, $0.count, 0, pointer, length) }
                    }
                } else {
                    message.withUnsafeBytes { Glibc.send(fd, $0.baseAddress, $0.count, 0) }
                }
            if count >= 0 { return }
            let number = errno
            if number == EAGAIN {
                await registration.waitWritable()
            } else if number != EINTR {
                throw ChannelError.system("send a datagram", number)
            }
        }
    }

    /// Waits for one message.
    ///
    /// - Parameter limit: how many bytes it may have; a longer one is cut, which `isTruncated` tells.
    public func receive(
        limit: Int = 65536
    ) async throws -> (message: [UInt8], sender: SocketAddress, isTruncated: Bool) {
        var bytes = [UInt8](repeating: 0, count: max(limit, 1))
        while true {
            if let failure { throw failure }
            var raw = RawAddress(storage: sockaddr_storage(), length: socklen_t(MemoryLayout<sockaddr_storage>.size))
            let count = bytes.withUnsafeMutableBytes { buffer in
                withUnsafeMutablePointer(to: &raw.storage) { pointer in
                    pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                        recvfrom(fd, buffer.baseAddress, limit, Self.reportsLength, $0, &raw.length)
                    }
                }
            }
            if count >= 0 { return (Array(bytes.prefix(min(count, limit))), raw.address, count > limit) }
            let number = errno
            if number == EAGAIN {
                await registration.waitReadable()
            } else if number != EINTR {
                throw ChannelError.system("receive a datagram", number)
            }
        }
    }

    /// Fails the channel from any thread: whatever waits on it throws `reason`.
    public func abort(_ reason: ChannelError) {
        loop.execute {
            self.failure = self.failure ?? reason
            self.registration.fail()
        }
    }

    /// Closes the socket.
    public func close() {
        guard fd >= 0 else { return }
        failure = failure ?? ChannelError(.closed, "The datagram socket is closed")
        loop.deregister(fd)
        registration.fail()
        Glibc.close(fd)
        fd = -1
    }
}
