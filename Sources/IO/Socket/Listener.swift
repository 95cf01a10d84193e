internal import CLinux
internal import Glibc

/// A listening socket: TCP, Unix or vsock.
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
        do {
            registration = try loop.register(fd)
        } catch {
            Glibc.close(fd)
            self.fd = -1
            throw error
        }
    }

    /// Takes over a socket that somebody else bound and put into the listening state. Called on the loop.
    ///
    /// - Throws: `ChannelError` when the descriptor is not open or no listening stream socket.
    public convenience init(inheriting fd: Int32, on loop: EventLoop) throws {
        var value: Int32 = 0
        var length = socklen_t(MemoryLayout<Int32>.size)
        guard getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &value, &length) == 0, value != 0 else {
            throw ChannelError(.system, "Descriptor \(fd), which this process inherited, is no listening socket")
        }
        _ = fcntl(fd, F_SETFD, FD_CLOEXEC)
        _ = xd_set_nonblocking(fd)
        let address = RawAddress.unixPath(of: fd).map { SocketAddress.unix(path: $0) } ?? RawAddress.of(fd, peer: false)
        // Whoever made its file removes it, too.
        try self.init(fd: fd, address: address, path: nil, on: loop)
    }

    /// Listens on all addresses of a name, each with a socket of its own. Called on the loop.
    static func listenEverywhere(on address: SocketAddress, loop: EventLoop) async throws -> [Listener] {
        guard case .inet(let host, var port) = address else { return [try await listen(on: address, loop: loop)] }
        let candidates = try await BlockingPool.shared.run { [port] in
            try RawAddress.resolve(host: host, port: port, passive: true)
        }
        var result: [Listener] = []
        for var candidate in candidates {
            let fd = xd_socket(candidate.family, Int32(SOCK_STREAM.rawValue))
            // The system may have no IPv6.
            if fd < 0, errno == EAFNOSUPPORT { continue }
            guard fd >= 0 else { throw ChannelError.system("make a socket", errno) }
            var one: Int32 = 1
            setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, socklen_t(MemoryLayout<Int32>.size))
            if candidate.family == AF_INET6 {
                setsockopt(fd, Int32(IPPROTO_IPV6), IPV6_V6ONLY, &one, socklen_t(MemoryLayout<Int32>.size))
            }
            candidate.setPort(port)
            guard candidate.withPointer({ Glibc.bind(fd, $0, $1) }) == 0, Glibc.listen(fd, 128) == 0 else {
                let number = errno
                Glibc.close(fd)
                if number == EADDRNOTAVAIL, candidates.count > 1 { continue }
                for listener in result { listener.close() }
                throw ChannelError.system("listen on \(address)", number)
            }
            let numeric = RawAddress.of(fd, peer: false)
            port = numeric.port ?? port
            result.append(try Listener(fd: fd, address: numeric, path: nil, on: loop))
        }
        guard !result.isEmpty else { throw ChannelError.system("listen on \(address)", EADDRNOTAVAIL) }
        return result
    }

    deinit { if fd >= 0 { Glibc.close(fd) } }

    /// Listens. Called on the loop.
    ///
    /// A Unix socket is made with mode 0600; a socket file that nobody listens on any more is replaced, any other file
    /// in its place is an error.
    public static func listen(on address: SocketAddress, loop: EventLoop, backlog: Int32 = 128) async throws -> Listener
    {
        switch address {
        case .vsock(let cid, let port):
            let fd = xd_socket(AF_VSOCK, Int32(SOCK_STREAM.rawValue))
            guard fd >= 0 else { throw ChannelError.system("make a vsock socket", errno) }
            guard xd_vsock_bind(fd, cid, port) == 0, Glibc.listen(fd, backlog) == 0 else {
                let number = errno
                Glibc.close(fd)
                throw ChannelError.system("listen on \(address)", number)
            }
            return try Listener(fd: fd, address: RawAddress.of(fd, peer: false), path: nil, on: loop)
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

    /// A connection that nothing watches yet.
    public struct Accepted: Sendable {
        /// The socket, non-blocking; it belongs to who accepted it.
        public let descriptor: Int32
        /// Who connected, for `SocketChannel`; nil where that says nothing. A peer that has gone already cannot be asked any more.
        public let peerName: String?
    }

    /// Waits for the next connection.
    ///
    /// A process that is out of descriptors waits a moment and tries again.
    public func acceptDescriptor() async throws -> Accepted {
        while true {
            if let failure { throw failure }
            var peer = RawAddress(storage: sockaddr_storage(), length: socklen_t(MemoryLayout<sockaddr_storage>.size))
            let connection = withUnsafeMutablePointer(to: &peer.storage) { xd_accept(fd, $0, &peer.length) }
            if connection >= 0 {
                let isInternet = [AF_INET, AF_INET6].contains(peer.family)
                return Accepted(descriptor: connection, peerName: isInternet ? peer.plainAddress.description : nil)
            }
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
        while true {
            let accepted = try await acceptDescriptor()
            let channel = try? SocketChannel(adopting: accepted.descriptor, on: loop, peerName: accepted.peerName)
            // A connection that cannot be watched is lost, the listener is not.
            if let channel { return channel }
            await loop.sleep(for: .milliseconds(20))
        }
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
