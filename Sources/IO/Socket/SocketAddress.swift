internal import CLinux
internal import Glibc

/// Where a stream socket listens or connects.
public enum SocketAddress: Sendable, Hashable, CustomStringConvertible {
    /// A host name or a literal address, and a port; port 0 lets the system choose when listening.
    case inet(host: String, port: UInt16)
    /// A Unix socket.
    case unix(path: String)
    /// A socket between a host and its virtual machines: the context id, 2 for the host and 1 for this machine, and a port.
    case vsock(cid: UInt32, port: UInt32)

    /// Reads `HOST`, `HOST:PORT`, `[IPV6]:PORT`, `unix:PATH` or `vsock:CID:PORT`.
    ///
    /// - Parameters:
    ///   - text: the address; an empty host means every local address.
    ///   - defaultPort: the port when the text has none.
    /// - Throws: `ChannelError` that says what is wrong with the text.
    public init(parsing text: String, defaultPort: UInt16) throws {
        if text.hasPrefix("unix:") {
            self = .unix(path: String(text.dropFirst(5)))
            return
        }
        if text.hasPrefix("vsock:") {
            let parts = text.dropFirst(6).split(separator: ":", omittingEmptySubsequences: false)
            guard parts.count == 2, let cid = UInt32(parts[0]), let port = UInt32(parts[1]) else {
                throw ChannelError(.unresolved, "'\(text)' is no vsock address; write vsock:CID:PORT with two numbers")
            }
            self = .vsock(cid: cid, port: port)
            return
        }
        var host = Substring(text)
        var port = defaultPort
        func parsePort(_ digits: Substring) throws -> UInt16 {
            guard let value = UInt16(digits) else {
                throw ChannelError(.unresolved, "'\(digits)' in '\(text)' is not a port number between 0 and 65535")
            }
            return value
        }
        if text.hasPrefix("[") {
            guard let end = text.firstIndex(of: "]") else {
                throw ChannelError(.unresolved, "'\(text)' has '[' without ']'; write [ADDRESS]:PORT")
            }
            host = text[text.index(after: text.startIndex)..<end]
            let rest = text[text.index(after: end)...]
            if rest.hasPrefix(":") {
                port = try parsePort(rest.dropFirst())
            } else if !rest.isEmpty {
                throw ChannelError(.unresolved, "'\(text)' has '\(rest)' after ']'; write [ADDRESS]:PORT")
            }
        } else if text.filter({ $0 == ":" }).count == 1, let colon = text.firstIndex(of: ":") {
            host = text[..<colon]
            port = try parsePort(text[text.index(after: colon)...])
        }
        // What resolvers would be asked for in vain, in words that do not say why.
        if let stranger = host.first(where: { "@/?#,'\"".contains($0) || $0.isWhitespace }) {
            throw ChannelError(
                .unresolved,
                "'\(text)' is no host, because of the '\(stranger)'; write HOST or HOST:PORT, without a user, a scheme or a path"
            )
        }
        self = .inet(host: String(host), port: port)
    }

    /// The address as it is written on a command line.
    public var description: String {
        switch self {
        case .inet(let host, let port): host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)"
        case .unix(let path): "unix:\(path)"
        case .vsock(let cid, let port): "vsock:\(cid):\(port)"
        }
    }

    /// The host of an Internet address, nil for a Unix socket.
    public var host: String? {
        if case .inet(let host, _) = self { host } else { nil }
    }

    /// The port of an Internet address.
    public var port: UInt16? {
        if case .inet(_, let port) = self { port } else { nil }
    }

    /// The same host with another port.
    public func with(port: UInt16) -> SocketAddress {
        if case .inet(let host, _) = self { .inet(host: host, port: port) } else { self }
    }
}

/// A socket address in the form of the system calls.
struct RawAddress: Sendable {
    var storage: sockaddr_storage
    var length: socklen_t

    var family: Int32 { Int32(storage.ss_family) }

    func withPointer<T>(_ body: (UnsafePointer<sockaddr>, socklen_t) -> T) -> T {
        withUnsafePointer(to: storage) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { body($0, length) }
        }
    }

    mutating func setPort(_ port: UInt16) {
        withUnsafeMutableBytes(of: &storage) { bytes in
            // The port is at the same place in sockaddr_in and sockaddr_in6, in network order.
            bytes.storeBytes(of: port.bigEndian, toByteOffset: 2, as: UInt16.self)
        }
    }

    /// Resolves a name. Blocks: run it on the pool.
    static func resolve(host: String, port: UInt16, passive: Bool) throws -> [RawAddress] {
        var hints = addrinfo()
        hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
        hints.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0)
        var list: UnsafeMutablePointer<addrinfo>?
        let code = getaddrinfo(host.isEmpty ? nil : host, String(port), &hints, &list)
        guard code == 0 else {
            throw ChannelError(.unresolved, "Cannot resolve host '\(host)': \(String(cString: gai_strerror(code)))")
        }
        defer { freeaddrinfo(list) }
        var result: [RawAddress] = []
        var cursor = list
        while let entry = cursor {
            var storage = sockaddr_storage()
            memcpy(&storage, entry.pointee.ai_addr, Int(entry.pointee.ai_addrlen))
            result.append(RawAddress(storage: storage, length: entry.pointee.ai_addrlen))
            cursor = entry.pointee.ai_next
        }
        return result
    }

    /// The numeric form.
    var address: SocketAddress {
        if family == AF_UNIX { return .unix(path: "") }
        var host = [CChar](repeating: 0, count: 256)
        var service = [CChar](repeating: 0, count: 32)
        _ = withPointer {
            getnameinfo($0, $1, &host, 256, &service, 32, NI_NUMERICHOST | NI_NUMERICSERV)
        }
        let text = { (chars: [CChar]) in
            String(decoding: chars.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
        }
        return .inet(host: text(host), port: UInt16(text(service)) ?? 0)
    }

    /// The numeric form as people know it: an IPv4 address on a socket that takes both families is one (RFC 4291, 2.5.5.2).
    var plainAddress: SocketAddress {
        guard family == AF_INET6 else { return address }
        return withUnsafeBytes(of: storage) { bytes in
            let host = bytes[8..<24]
            guard host.prefix(10).allSatisfy({ $0 == 0 }), host.dropFirst(10).prefix(2).allSatisfy({ $0 == 0xff })
            else { return address }
            let port = UInt16(bytes[2]) << 8 | UInt16(bytes[3])
            return .inet(host: host.suffix(4).map { "\($0)" }.joined(separator: "."), port: port)
        }
    }

    static func of(_ fd: Int32, peer: Bool) -> SocketAddress {
        var raw = RawAddress(storage: sockaddr_storage(), length: socklen_t(MemoryLayout<sockaddr_storage>.size))
        withUnsafeMutablePointer(to: &raw.storage) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                _ = peer ? getpeername(fd, $0, &raw.length) : getsockname(fd, $0, &raw.length)
            }
        }
        if raw.family == AF_VSOCK {
            var cid: UInt32 = 0
            var port: UInt32 = 0
            _ = xd_vsock_name(fd, peer ? 1 : 0, &cid, &port)
            return .vsock(cid: cid, port: port)
        }
        return raw.plainAddress
    }

    /// The path that a Unix socket is bound to; nil for other sockets, and for those without a path.
    static func unixPath(of fd: Int32) -> String? {
        var name = sockaddr_un()
        var length = socklen_t(MemoryLayout<sockaddr_un>.size)
        let code = withUnsafeMutablePointer(to: &name) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { getsockname(fd, $0, &length) }
        }
        guard code == 0, Int32(name.sun_family) == AF_UNIX else { return nil }
        let path = withUnsafeBytes(of: name) { bytes in
            // A path of the greatest length has no zero at its end (unix(7)).
            String(decoding: bytes.prefix(Int(length)).dropFirst(2).prefix { $0 != 0 }, as: UTF8.self)
        }
        return path.isEmpty ? nil : path
    }
}
