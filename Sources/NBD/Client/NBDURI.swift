public import IO

/// A standard NBD URI (NBD specification, `doc/uri.md`, with libnbd's additions).
///
/// `nbd://HOST[:PORT]/EXPORT`, `nbds://` for TLS, `nbd+unix:///EXPORT?socket=PATH`, `nbd+vsock://CID[:PORT]/EXPORT` and the same with
/// `nbds`. A user before the host is the user of a pre-shared key.
public struct NBDURI: Sendable, Equatable, CustomStringConvertible {
    /// Where the server is.
    public var address: SocketAddress
    /// Whether TLS is required.
    public var usesTLS: Bool
    /// The export's name; empty for the default export.
    public var export: String
    /// The user of a pre-shared key.
    public var user: String?
    /// `tls-certificates`: a credential directory.
    public var certificates: String?
    /// `tls-psk-file`: a file of pre-shared keys.
    public var keyFile: String?
    /// `tls-hostname`: the name that the certificate must be for, when it is not the host.
    public var hostname: String?
    /// `tls-verify-peer`: whether the server's certificate is checked.
    public var verifiesPeer = true
    private let text: String

    /// The URI as it was given.
    public var description: String { text }

    /// The URI of another export of the same server.
    public func text(of export: String) -> String {
        guard let start = text.firstRange(of: "://")?.upperBound else { return text }
        let rest = text[start...]
        let authority = rest.prefix { $0 != "/" && $0 != "?" }
        let parameters = rest.firstIndex(of: "?").map { String(rest[$0...]) } ?? ""
        let name = export.utf8.map { byte in
            let isPlain =
                (byte >= 48 && byte <= 57) || (byte >= 65 && byte <= 90) || (byte >= 97 && byte <= 122)
                || [45, 46, 47, 95, 126].contains(byte)
            return isPlain ? String(UnicodeScalar(byte)) : "%" + [byte].hex.uppercased()
        }
        return "\(text[..<start])\(authority)/\(name.joined())\(parameters)"
    }

    /// The name that the server's certificate must be for; nil when the URI has none.
    public var certificateName: String? { hostname ?? address.host }

    /// What a URI may be a URI of.
    private static let schemes: [String: (usesTLS: Bool, transport: String)] = [
        "nbd": (false, "tcp"), "nbds": (true, "tcp"), "nbd+tcp": (false, "tcp"), "nbds+tcp": (true, "tcp"),
        "nbd+unix": (false, "unix"), "nbds+unix": (true, "unix"), "nbd+vsock": (false, "vsock"),
        "nbds+vsock": (true, "vsock"),
    ]

    /// Whether a text looks like an NBD URI, rather than like a file.
    public static func isURI(_ text: String) -> Bool {
        guard let colon = text.firstIndex(of: ":") else { return false }
        return text[..<colon].hasPrefix("nbd") && text[colon...].hasPrefix("://")
    }

    /// Reads a URI.
    ///
    /// - Throws: `ChannelError` that says what is wrong with it; unknown parameters are wrong, but for those that begin with `x-`.
    public init(parsing text: String) throws {
        func fault(_ reason: String) -> ChannelError {
            ChannelError(.unresolved, "The NBD URI '\(text)' is wrong: \(reason)")
        }
        self.text = text
        guard let range = text.firstRange(of: "://") else {
            throw fault("it has no '://'; write nbd://HOST/EXPORT, or nbds:// for TLS")
        }
        let scheme = text[..<range.lowerBound].lowercased()
        guard let kind = Self.schemes[scheme] else {
            throw fault("'\(scheme)' is none of \(Self.schemes.keys.sorted().joined(separator: ", "))")
        }
        usesTLS = kind.usesTLS
        var rest = text[range.upperBound...]
        guard !rest.contains("#") else { throw fault("it has a fragment; write '#' as %23") }
        var parameters: [(String, String)] = []
        if let mark = rest.firstIndex(of: "?") {
            for item in rest[rest.index(after: mark)...].split(whereSeparator: { $0 == "&" || $0 == ";" }) {
                let parts = item.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
                guard let name = Self.decode(parts[0]), let value = Self.decode(parts.count > 1 ? parts[1] : "") else {
                    throw fault("'\(item)' is not encoded properly")
                }
                parameters.append((name, value))
            }
            rest = rest[..<mark]
        }
        let slash = rest.firstIndex(of: "/") ?? rest.endIndex
        var authority = rest[..<slash]
        guard let export = Self.decode(rest[slash...].dropFirst()) else {
            throw fault("the export's name is not encoded properly")
        }
        guard export.utf8.count <= NBDWire.maximumString, !export.utf8.contains(0) else {
            throw fault("the export's name is longer than \(NBDWire.maximumString) bytes, or has a zero byte")
        }
        self.export = export
        if let at = authority.lastIndex(of: "@") {
            guard let user = Self.decode(authority[..<at]), !user.isEmpty else {
                throw fault("the user is not encoded properly")
            }
            self.user = user
            authority = authority[authority.index(after: at)...]
        }
        var socket: String?
        var type: String?
        for (name, value) in parameters {
            switch name {
            case "socket": socket = value
            case "tls-certificates": certificates = value
            case "tls-psk-file": keyFile = value
            case "tls-hostname": hostname = value
            case "tls-type": type = value
            case "tls-verify-peer":
                guard ["true", "false", "on", "off", "1", "0", "yes", "no"].contains(value.lowercased()) else {
                    throw fault("tls-verify-peer is 'true' or 'false', not '\(value)'")
                }
                verifiesPeer = ["true", "on", "1", "yes"].contains(value.lowercased())
            case let other where other.hasPrefix("x-"): continue
            default: throw fault("the parameter '\(name)' is not known")
            }
        }
        if let type, !["x509", "psk", "anon"].contains(type) {
            throw fault("tls-type is 'x509' or 'psk', not '\(type)'")
        }
        if type == "anon" { throw fault("connections without any authentication are not made; use x509 or psk") }
        if (type == "psk" && certificates != nil) || (type == "x509" && keyFile != nil) {
            throw fault("tls-type says something else than the credentials")
        }
        if !usesTLS, certificates != nil || keyFile != nil || hostname != nil || type != nil {
            throw fault("it has TLS parameters, but its scheme is not nbds")
        }
        address = try Self.address(kind.transport, authority, socket, fault)
    }

    private static func address(
        _ transport: String,
        _ authority: Substring,
        _ socket: String?,
        _ fault: (String) -> ChannelError
    ) throws -> SocketAddress {
        switch transport {
        case "unix":
            guard authority.isEmpty else {
                throw fault("a Unix socket has no host; write nbd+unix:///EXPORT?socket=PATH")
            }
            guard let socket, !socket.isEmpty else { throw fault("the parameter 'socket' is missing") }
            guard socket.utf8.count < 108, !socket.utf8.contains(0) else {
                throw fault("the socket's path is longer than 107 bytes, or has a zero byte")
            }
            return .unix(path: socket)
        case "vsock":
            let parts = authority.split(separator: ":", omittingEmptySubsequences: false)
            guard socket == nil, parts.count <= 2, let cid = UInt32(parts.first.map(String.init) ?? ""),
                let port = parts.count == 2 ? UInt32(parts[1]) : UInt32(NBDWire.port)
            else { throw fault("it needs a context id and may have a port: nbd+vsock://CID:PORT/EXPORT") }
            return .vsock(cid: cid, port: port)
        default:
            guard socket == nil else { throw fault("'socket' is only for nbd+unix and nbds+unix") }
            guard let host = decode(authority) else { throw fault("the host is not encoded properly") }
            let colons = host.filter { $0 == ":" }.count
            guard host.hasPrefix("[") || colons <= 1 else { throw fault("an IPv6 address is written in [brackets]") }
            guard !host.hasPrefix("unix:") else {
                throw fault("a Unix socket is written nbd+unix:///EXPORT?socket=PATH")
            }
            let parsed = try SocketAddress(parsing: host, defaultPort: NBDWire.port)
            // RFC 3986 has the local host for an empty one.
            if parsed.host == "", let port = parsed.port { return .inet(host: "localhost", port: port) }
            return parsed
        }
    }

    /// Decodes %XX; nil when the result is no UTF-8 or a % stands alone.
    private static func decode(_ text: some StringProtocol) -> String? {
        var bytes: [UInt8] = []
        var rest = Substring(text).utf8[...]
        while let byte = rest.popFirst() {
            guard byte == UInt8(ascii: "%") else {
                bytes.append(byte)
                continue
            }
            let digits = rest.prefix(2)
            guard digits.count == 2, digits.allSatisfy({ isxdigit($0) }),
                let value = UInt8(String(decoding: digits, as: UTF8.self), radix: 16)
            else { return nil }
            bytes.append(value)
            rest = rest.dropFirst(2)
        }
        return String(validating: bytes, as: UTF8.self)
    }

    private static func isxdigit(_ byte: UInt8) -> Bool {
        (48...57).contains(byte) || (65...70).contains(byte) || (97...102).contains(byte)
    }
}
