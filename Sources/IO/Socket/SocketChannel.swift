internal import CLinux
public import Glibc

/// A connected stream socket: TCP or Unix.
public final class SocketChannel: Channel, @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// The loop that watches the socket.
    public let loop: EventLoop
    /// A socket can be half-closed; a Unix socket passes open files.
    public let features: ChannelFeatures
    /// The peer's address, or the path that was connected to.
    public let peerName: String
    private var fd: Int32
    /// The socket's descriptor, for a child process that inherits it; it stays the channel's.
    public var descriptor: Int32 { fd }
    private let registration: Registration
    private var failure: ChannelError?

    /// Takes over a connected, non-blocking socket. Called on the loop.
    ///
    /// - Parameters:
    ///   - fd: the socket; owned by the channel from here on, also when this throws.
    ///   - loop: the loop.
    ///   - peerName: the peer's name; the address of the peer when it is not given.
    public init(adopting fd: Int32, on loop: EventLoop, peerName: String? = nil) throws {
        self.fd = fd
        self.loop = loop
        let address = RawAddress.of(fd, peer: true)
        self.peerName = peerName ?? address.description
        if case .unix = address { features = [.halfClose, .passesDescriptors] } else { features = [.halfClose] }
        if case .inet = address {
            // A request leaves in one write, so Nagle's algorithm could only delay it.
            var one: Int32 = 1
            setsockopt(fd, Int32(IPPROTO_TCP), TCP_NODELAY, &one, socklen_t(MemoryLayout<Int32>.size))
            setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, socklen_t(MemoryLayout<Int32>.size))
            // A peer whose host has vanished is noticed within a minute: TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT in
            // seconds and probes, TCP_USER_TIMEOUT in milliseconds for data that is not acknowledged.
            for (option, value) in [(4, 15), (5, 5), (6, 6), (18, 60_000)] as [(Int32, Int32)] {
                var value = value
                setsockopt(fd, Int32(IPPROTO_TCP), option, &value, socklen_t(MemoryLayout<Int32>.size))
            }
        }
        do {
            registration = try loop.register(fd)
        } catch {
            Glibc.close(fd)
            throw error
        }
    }

    /// Takes over a socket that another loop has let go.
    private init(_ fd: Int32, like channel: SocketChannel, on loop: EventLoop) throws {
        self.fd = fd
        self.loop = loop
        peerName = channel.peerName
        features = channel.features
        do {
            registration = try loop.register(fd)
        } catch {
            Glibc.close(fd)
            throw error
        }
    }

    /// Has another loop watch the socket. Called on this channel's loop while nobody waits for it.
    ///
    /// - Returns: the channel from here on; this one is closed.
    /// - Throws: `ChannelError` when the channel has failed or is closed already.
    public func moved(to target: EventLoop) async throws -> SocketChannel {
        if let failure { throw failure }
        let descriptor = fd
        loop.deregister(descriptor)
        registration.fail()
        fd = -1
        failure = ChannelError(.closed, "The connection to \(peerName) has another loop")
        return try await target.run { try SocketChannel(descriptor, like: self, on: target) }
    }

    deinit {
        if fd >= 0 {
            let fd = fd
            let loop = loop
            if loop.isCurrent {
                loop.deregister(fd)
                Glibc.close(fd)
            } else {
                loop.execute {
                    loop.deregister(fd)
                    Glibc.close(fd)
                }
            }
        }
    }

    /// Connects to an address, trying each address that the name resolves to. Called on the loop.
    ///
    /// - Parameters:
    ///   - address: where to.
    ///   - loop: the loop of the new channel.
    ///   - timeout: the time allowed for all of it.
    /// - Throws: `ChannelError` with `Code.unresolved`, `Code.timedOut` or `Code.system`, naming the address.
    public static func connect(
        to address: SocketAddress,
        on loop: EventLoop,
        timeout: Duration = .seconds(10)
    ) async throws -> SocketChannel {
        switch address {
        case .vsock(let cid, let port):
            let fd = xd_socket(AF_VSOCK, Int32(SOCK_STREAM.rawValue))
            guard fd >= 0 else { throw ChannelError.system("make a vsock socket", errno) }
            if xd_vsock_connect(fd, cid, port) != 0, errno != EINPROGRESS {
                let number = errno
                Glibc.close(fd)
                throw ChannelError.system("connect to \(address)", number)
            }
            return try await connecting(fd, address, on: loop, until: .now + timeout)
        case .unix(let path):
            let fd = xd_socket(AF_UNIX, Int32(SOCK_STREAM.rawValue))
            guard fd >= 0 else { throw ChannelError.system("make a socket", errno) }
            // A full backlog of a Unix socket shows as EAGAIN, which no readiness event ends.
            let end = ContinuousClock.now + timeout
            while xd_unix_connect(fd, path) != 0 {
                let number = errno
                guard number == EAGAIN, ContinuousClock.now < end else {
                    Glibc.close(fd)
                    if number == EAGAIN {
                        throw ChannelError(
                            .timedOut,
                            "Nobody accepts connections at the socket \(path), although it is there"
                        )
                    }
                    throw ChannelError.system("connect to the socket \(path)", number)
                }
                await loop.sleep(for: .milliseconds(20))
            }
            return try SocketChannel(adopting: fd, on: loop, peerName: path)
        case .inet(let host, let port):
            let candidates = try await BlockingPool.shared.run {
                try RawAddress.resolve(host: host, port: port, passive: false)
            }
            let end = ContinuousClock.now + timeout
            var last = ChannelError(.unresolved, "'\(host)' has no address")
            for candidate in candidates {
                do {
                    return try await connect(candidate, address, on: loop, until: end)
                } catch let error as ChannelError {
                    last = error
                }
            }
            throw last
        }
    }

    private static func connect(
        _ candidate: RawAddress,
        _ address: SocketAddress,
        on loop: EventLoop,
        until end: ContinuousClock.Instant
    ) async throws -> SocketChannel {
        let fd = xd_socket(candidate.family, Int32(SOCK_STREAM.rawValue))
        guard fd >= 0 else { throw ChannelError.system("make a socket", errno) }
        let result = candidate.withPointer { Glibc.connect(fd, $0, $1) }
        if result != 0, errno != EINPROGRESS {
            let number = errno
            Glibc.close(fd)
            throw ChannelError.system("connect to \(address)", number)
        }
        return try await connecting(fd, address, on: loop, until: end)
    }

    private static func connecting(
        _ fd: Int32,
        _ address: SocketAddress,
        on loop: EventLoop,
        until end: ContinuousClock.Instant
    ) async throws -> SocketChannel {
        let channel = try SocketChannel(adopting: fd, on: loop, peerName: address.description)
        do {
            try await channel.withCancellation {
                try await channel.withDeadline(end - .now, for: "Connecting") {
                    try await channel.waitWritable()
                }
            }
            var number: Int32 = 0
            var length = socklen_t(MemoryLayout<Int32>.size)
            getsockopt(fd, SOL_SOCKET, SO_ERROR, &number, &length)
            if number != 0 { throw ChannelError.system("connect to \(address)", number) }
            return channel
        } catch {
            channel.close()
            throw error
        }
    }

    /// Makes a connected pair of Unix sockets. Called on the loop.
    public static func pair(on loop: EventLoop) throws -> (SocketChannel, SocketChannel) {
        var descriptors: (Int32, Int32) = (-1, -1)
        let result = withUnsafeMutablePointer(to: &descriptors) {
            $0.withMemoryRebound(to: Int32.self, capacity: 2) { xd_socketpair($0) }
        }
        guard result == 0 else { throw ChannelError.system("make a pair of sockets", errno) }
        let first = try SocketChannel(adopting: descriptors.0, on: loop, peerName: "socketpair")
        return (first, try SocketChannel(adopting: descriptors.1, on: loop, peerName: "socketpair"))
    }

    /// The local address.
    public var localAddress: SocketAddress? { RawAddress.of(fd, peer: false) }
    /// The peer's address.
    public var peerAddress: SocketAddress? { RawAddress.of(fd, peer: true) }

    /// See `Channel.setCork(_:)`.
    public func setCork(_ enabled: Bool) { setTCP(3, enabled) }
    /// See `Channel.setDelay(_:)`.
    public func setDelay(_ enabled: Bool) { setTCP(TCP_NODELAY, !enabled) }

    private func setTCP(_ option: Int32, _ enabled: Bool) {
        // Sockets of other families refuse, which is what "nothing happens" means.
        var value: Int32 = enabled ? 1 : 0
        setsockopt(fd, Int32(IPPROTO_TCP), option, &value, socklen_t(MemoryLayout<Int32>.size))
    }

    /// Writes bytes with open files attached to the first of them (SCM_RIGHTS). Called on the loop.
    ///
    /// - Parameters:
    ///   - bytes: at least one byte, of which all are written.
    ///   - descriptors: at most 253; the peer gets copies, the caller keeps its own.
    /// - Throws: `ChannelError`; for a socket that is not a Unix socket as well.
    public func write(_ bytes: [UInt8], passing descriptors: [Int32]) async throws {
        guard features.contains(.passesDescriptors) else {
            throw ChannelError(.protocolViolation, "Open files cannot be passed to \(peerName): it is no Unix socket")
        }
        precondition(!bytes.isEmpty, "open files travel with at least one byte")
        let buffer = IOBuffer(copying: bytes)
        while true {
            if let failure { throw failure }
            let part = buffer.bytes(0..<bytes.count)
            var vector = iovec(iov_base: UnsafeMutableRawPointer(mutating: part.baseAddress), iov_len: part.count)
            let count = xd_send_with_descriptors(fd, &vector, 1, descriptors, Int32(descriptors.count))
            if count >= 0 { return try await writeAll(buffer.bytes(count..<bytes.count)) }
            let number = errno
            if number == EAGAIN {
                try await waitWritable()
            } else if number != EINTR {
                throw ChannelError.system("pass open files to \(peerName)", number)
            }
        }
    }

    /// Reads bytes together with the open files that are attached to them. Called on the loop.
    ///
    /// - Parameters:
    ///   - buffer: where the bytes go.
    ///   - limit: how many open files are taken at most; more are an error, and all are closed.
    /// - Returns: the number of bytes, 0 at the end; and the descriptors, close-on-exec, which belong to the caller.
    public func readSome(
        into buffer: UnsafeMutableRawBufferPointer,
        receiving limit: Int
    ) async throws -> (count: Int, descriptors: [Int32]) {
        while true {
            if let failure { throw failure }
            var vector = iovec(iov_base: buffer.baseAddress, iov_len: buffer.count)
            var descriptors = [Int32](repeating: -1, count: limit)
            var received = Int32(limit)
            var lost: Int32 = 0
            let count = xd_receive_with_descriptors(fd, &vector, 1, &descriptors, &received, &lost)
            let number = errno
            let taken = Array(descriptors.prefix(Int(received)))
            if count >= 0 {
                guard lost == 0 else {
                    for descriptor in taken { Glibc.close(descriptor) }
                    throw ChannelError(.protocolViolation, "\(peerName) passed more than \(limit) open files at once")
                }
                return (count, taken)
            }
            if number == EAGAIN {
                try await waitReadable()
            } else if number != EINTR {
                throw ChannelError.system("read from \(peerName)", number)
            }
        }
    }

    /// The process and user at the other end of a Unix socket; nil for other sockets.
    public var peerCredentials: (process: Int32, user: UInt32)? {
        var process: pid_t = 0
        var user: uid_t = 0
        guard xd_peer_credentials(fd, &process, &user) == 0 else { return nil }
        return (process, user)
    }

    /// Whether the other end of a Unix socket is a certain process, or, when none is given, one of this user's or root's.
    public func isFrom(process: Int32?) -> Bool {
        guard let (found, user) = peerCredentials else { return false }
        return process.map { $0 == found } ?? (user == geteuid() || user == 0)
    }

    /// Whether the other end of a Unix socket has not taken all that was written.
    public var hasUntaken: Bool { xd_has_untaken(fd) != 0 }

    /// Bounds what the kernel holds of this stream before it is on the wire, in bytes; without a bound a slow link has
    /// seconds of data queued. Has no effect on a Unix socket.
    public func limitUnsent(_ bytes: Int) {
        var value = Int32(clamping: bytes)
        // TCP_NOTSENT_LOWAT
        setsockopt(fd, Int32(IPPROTO_TCP), 25, &value, socklen_t(MemoryLayout<Int32>.size))
    }

    /// Lets the peer stop reading for as long as it likes. Otherwise data that it does not take for a minute ends the connection,
    /// also when the peer's system still answers.
    public func toleratePauses() {
        var value: Int32 = 0
        // TCP_USER_TIMEOUT
        setsockopt(fd, Int32(IPPROTO_TCP), 18, &value, socklen_t(MemoryLayout<Int32>.size))
    }

    /// See `Channel.read(into:)`.
    public func read(into buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        while true {
            if let failure { throw failure }
            if registration.isDrained { return nil }
            if buffers.count == 1 {
                let count = Glibc.recv(fd, buffers[0].iov_base, buffers[0].iov_len, 0)
                if count > 0, count < buffers[0].iov_len { registration.noteShortRead() }
                if count >= 0 { return count }
            } else {
                let count = Glibc.readv(fd, buffers.baseAddress, Int32(buffers.count))
                if count >= 0 { return count }
            }
            let number = errno
            if number == EAGAIN { return nil }
            if number != EINTR { throw ChannelError.system("read from \(peerName)", number) }
        }
    }

    /// See `Channel.write(from:)`.
    public func write(from buffers: UnsafeBufferPointer<iovec>) throws -> Int? {
        var message = msghdr()
        message.msg_iov = UnsafeMutablePointer(mutating: buffers.baseAddress)
        message.msg_iovlen = buffers.count
        while true {
            if let failure { throw failure }
            let count = Glibc.sendmsg(fd, &message, Int32(MSG_NOSIGNAL))
            if count >= 0 { return count }
            let number = errno
            if number == EAGAIN { return nil }
            if number != EINTR { throw ChannelError.system("write to \(peerName)", number) }
        }
    }

    /// Nothing is held back.
    public func flush() throws -> Bool {
        if let failure { throw failure }
        return true
    }

    /// See `Channel.waitReadable()`.
    public func waitReadable() async throws {
        if let failure { throw failure }
        await registration.waitReadable()
        if let failure { throw failure }
    }

    /// See `Channel.waitWritable()`.
    public func waitWritable() async throws {
        if let failure { throw failure }
        await registration.waitWritable()
        if let failure { throw failure }
    }

    /// Shuts the outgoing direction.
    public func finishWriting() async throws {
        if let failure { throw failure }
        if Glibc.shutdown(fd, Int32(SHUT_WR)) != 0, errno != ENOTCONN {
            throw ChannelError.system("end the stream to \(peerName)", errno)
        }
    }

    /// See `Channel.abort(_:)`.
    public func abort(_ reason: ChannelError) {
        loop.execute {
            guard self.failure == nil else { return }
            self.failure = reason
            if self.fd >= 0 { Glibc.shutdown(self.fd, Int32(SHUT_RDWR)) }
            self.registration.fail()
        }
    }

    /// Closes the socket.
    public func close() {
        guard fd >= 0 else { return }
        if failure == nil { failure = ChannelError(.closed, "The connection to \(peerName) is closed") }
        loop.deregister(fd)
        registration.fail()
        Glibc.close(fd)
        fd = -1
    }
}
