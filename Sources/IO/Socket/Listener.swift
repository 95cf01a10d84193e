internal import CLinux
internal import Glibc

/// A listening socket: TCP or Unix.
public final class Listener: @unchecked Sendable {
    // Unchecked: confined to the loop, but for `abort`.

    /// Where it listens; the port is the real one when the system chose it.
    public let address: SocketAddress
    /// The loop that watches the socket.
    public let loop: EventLoop
    private var fd: Int32
    private let registration: Registration
    private var failure: ChannelError?
    private let path: String?

    private init(fd: Int32, address: SocketAddress, path: String?, on loop: EventLoop) throws {
        self.fd = fd
        self.address = address
        self.path = path
        self.loop = loop
        registration = try loop.register(fd)
    }

    deinit { if fd >= 0 { Glibc.close(fd) } }

    /// Listens. Called on the loop.
    ///
    /// A Unix socket is made with mode 0600; a socket file that nobody listens on any more is replaced, any other file
    /// in its place is an error.
    public static func listen(on address: SocketAddress, loop: EventLoop, backlog: Int32 = 128) async throws -> Listener
    {
        switch address {
        case .unix(let path):
            let fd = xd_socket(AF_UNIX, Int32(SOCK_STREAM.rawValue))
            guard fd >= 0 else { throw ChannelError.system("make a socket", errno) }
            var result = xd_unix_bind(fd, path)
            if result != 0, errno == EADDRINUSE, isStaleSocket(path) {
                unlink(path)
                result = xd_unix_bind(fd, path)
            }
            guard result == 0, Glibc.listen(fd, backlog) == 0 else {
                let number = errno
                Glibc.close(fd)
                throw ChannelError.system("listen on the socket \(path)", number)
            }
            return try Listener(fd: fd, address: address, path: path, on: loop)
        case .inet(let host, let port):
            let candidates = try await BlockingPool.shared.run {
                try RawAddress.resolve(host: host, port: port, passive: true)
            }
            var number: Int32 = EADDRNOTAVAIL
            // Every address: the IPv6 socket takes IPv4 connections as well, so it is tried first.
            let ordered =
                host.isEmpty ? candidates.sorted { $0.family == AF_INET6 && $1.family != AF_INET6 } : candidates
            for candidate in ordered {
                let fd = xd_socket(candidate.family, Int32(SOCK_STREAM.rawValue))
                guard fd >= 0 else { continue }
                var one: Int32 = 1
                setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, socklen_t(MemoryLayout<Int32>.size))
                if candidate.withPointer({ Glibc.bind(fd, $0, $1) }) == 0, Glibc.listen(fd, backlog) == 0 {
                    let chosen = RawAddress.of(fd, peer: false).port ?? port
                    return try Listener(fd: fd, address: .inet(host: host, port: chosen), path: nil, on: loop)
                }
                number = errno
                Glibc.close(fd)
            }
            throw ChannelError.system("listen on \(address)", number)
        }
    }

    private static func isStaleSocket(_ path: String) -> Bool {
        var status = stat()
        guard lstat(path, &status) == 0, status.st_mode & S_IFMT == S_IFSOCK else { return false }
        let probe = xd_socket(AF_UNIX, Int32(SOCK_STREAM.rawValue))
        defer { Glibc.close(probe) }
        return xd_unix_connect(probe, path) != 0 && errno == ECONNREFUSED
    }

    /// Waits for the next connection and returns its descriptor, non-blocking; the caller owns it.
    ///
    /// A process that is out of descriptors waits a moment and tries again.
    public func acceptDescriptor() async throws -> Int32 {
        while true {
            if let failure { throw failure }
            let connection = xd_accept(fd)
            if connection >= 0 { return connection }
            switch errno {
            case EAGAIN: await registration.waitReadable()
            case EINTR: continue
            case EMFILE, ENFILE, ENOBUFS, ENOMEM: await loop.sleep(for: .milliseconds(50))
            case EBADF, EINVAL, ENOTSOCK: throw ChannelError.system("accept a connection on \(address)", errno)
            default:
                // The error belongs to the connection that was not made (accept(2)), not to the listener.
                await loop.sleep(for: .milliseconds(20))
            }
        }
    }

    /// Waits for the next connection and makes a channel of it, on the listener's loop.
    public func accept() async throws -> SocketChannel {
        try SocketChannel(adopting: try await acceptDescriptor(), on: loop)
    }

    /// Ends the listening from any thread: a waiting `accept` throws, the socket is closed, a Unix socket's file removed.
    public func abort() {
        loop.execute { self.close() }
    }

    /// Ends the listening. Called on the loop.
    public func close() {
        guard fd >= 0 else { return }
        failure = ChannelError(.closed, "The listener on \(address) is closed")
        loop.deregister(fd)
        registration.fail()
        Glibc.close(fd)
        fd = -1
        if let path { unlink(path) }
    }
}
