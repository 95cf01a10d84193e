internal import Glibc
internal import IO

/// A host and a port as a browser names them: in `Host`, and behind the scheme in `Origin`.
struct Authority: Sendable, Hashable {
    /// In lower case; an IPv6 address without its brackets.
    let host: String
    let port: UInt16

    init(host: String, port: UInt16) {
        self.host = host
        self.port = port
    }

    /// Reads `NAME`, `NAME:PORT` or `[ADDRESS]:PORT`; nil for what is none.
    ///
    /// - Parameter defaultPort: that of the scheme.
    init?(parsing text: String, defaultPort: UInt16) {
        let bytes = Array(text.utf8)
        guard (1...261).contains(bytes.count) else { return nil }
        var name = bytes[...]
        var rest: ArraySlice<UInt8>
        if bytes[0] == UInt8(ascii: "[") {
            guard let end = bytes.firstIndex(of: UInt8(ascii: "]")) else { return nil }
            (name, rest) = (bytes[1..<end], bytes[(end + 1)...])
            var address = in6_addr()
            guard inet_pton(AF_INET6, String(decoding: name, as: UTF8.self), &address) == 1 else { return nil }
        } else {
            let colon = bytes.firstIndex(of: UInt8(ascii: ":")) ?? bytes.endIndex
            (name, rest) = (bytes[..<colon], bytes[colon...])
            let isName = name.allSatisfy {
                (48...57).contains($0) || (65...90).contains($0) || (97...122).contains($0) || $0 == 45 || $0 == 46
                    || $0 == 95
            }
            guard isName, !name.isEmpty else { return nil }
        }
        var port = defaultPort
        if let colon = rest.first {
            rest.removeFirst()
            guard colon == UInt8(ascii: ":"), (1...5).contains(rest.count), rest.allSatisfy({ (48...57).contains($0) }),
                let number = UInt16(String(decoding: rest, as: UTF8.self))
            else { return nil }
            port = number
        }
        host = String(decoding: name, as: UTF8.self).lowercased()
        self.port = port
    }

    /// Reads an origin, `https://NAME:PORT` (RFC 6454, section 6.1); nil for what is none, "null" among it, and for another scheme.
    init?(origin text: String, scheme: WebScheme) {
        let prefix = "\(scheme.rawValue)://"
        guard text.utf8.starts(with: prefix.utf8) else { return nil }
        let rest = String(decoding: text.utf8.dropFirst(prefix.utf8.count), as: UTF8.self)
        self.init(parsing: rest, defaultPort: scheme.defaultPort)
    }
}

/// How a browser speaks to a port.
enum WebScheme: String, Sendable {
    case http
    case https

    /// The port that is not written.
    var defaultPort: UInt16 { self == .http ? 80 : 443 }
}

/// By which names a port of this host may be called: what DNS rebinding and pages of others cannot forge (a browser says truly by
/// which name it was led here).
struct OwnNames: Sendable {
    /// Names and addresses, in lower case, that are this host's on the port that was connected to.
    var hosts: Set<String>
    /// Names with their own ports: those of a proxy.
    var proxies: Set<Authority>

    /// Whether a request was meant for a socket of this host that has no name: by a program, or through a port of loopback that leads to it.
    static func isLocal(_ host: String) -> Bool {
        guard let authority = Authority(parsing: host, defaultPort: WebScheme.http.defaultPort) else { return false }
        return ["localhost", "127.0.0.1", "::1"].contains(authority.host)
    }

    /// Whether a request was meant for this host.
    ///
    /// - Parameters:
    ///   - host: its `Host`.
    ///   - local: the address that the connection came to.
    ///   - scheme: how it came.
    func accepts(host: String, at local: SocketAddress?, _ scheme: WebScheme) -> Bool {
        guard let authority = Authority(parsing: host, defaultPort: scheme.defaultPort) else { return false }
        if proxies.contains(authority) { return true }
        guard case .inet(let address, let port)? = local, port == authority.port else { return false }
        return authority.host == address.lowercased() || hosts.contains(authority.host)
    }

    /// Whether the page that asks is one of ours: its origin is the one that the request itself was sent to.
    func accepts(origin: String?, host: String, _ scheme: WebScheme) -> Bool {
        guard let origin, let from = Authority(origin: origin, scheme: scheme),
            let to = Authority(parsing: host, defaultPort: scheme.defaultPort)
        else { return false }
        return from == to
    }
}
