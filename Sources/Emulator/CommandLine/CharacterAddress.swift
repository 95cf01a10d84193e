internal import IO

/// What `-serial`, `-monitor` and their like take: a character device in one word, as QEMU's `qemu_chr_parse_compat` reads it.
struct CharacterAddress {
    /// What is behind it.
    enum Target: Equatable {
        /// `none`, `null`, `stdio`, `vc:80Cx24C` and the like.
        case word(String)
        /// `chardev:ID`.
        case device(String)
        /// `file:PATH`, `pipe:PATH`: the whole rest is the path.
        case path(scheme: String, String)
        /// `unix:PATH,...`.
        case socket(String)
        /// `tcp:HOST:PORT,...`, `telnet:`, `websocket:`, `tn3270:`.
        case network(scheme: String, host: String, port: String)
        /// `udp:HOST:PORT@HOST:PORT`.
        case datagram(String)
        /// A device of this host, or anything else.
        case other(String)
    }

    /// Whether a monitor shares it: `mon:`.
    var hasMonitor: Bool
    var target: Target
    /// What follows the address.
    var settings: BlockOptions

    private static let words: Set<String> = [
        "none", "null", "vc", "pty", "stdio", "msmouse", "wctablet", "testdev",
    ]
    private static let networks = ["tcp", "telnet", "websocket", "tn3270"]

    init(_ argument: String) throws {
        hasMonitor = argument.hasPrefix("mon:")
        let form = hasMonitor ? String(argument.dropFirst(4)) : argument
        settings = try BlockOptions(parsing: "")
        let scheme = String(form.prefix { $0 != ":" })
        let rest = form.dropFirst(scheme.count + 1)
        guard form.contains(":") else {
            target = Self.words.contains(form) ? .word(form) : .other(form)
            return
        }
        switch scheme {
        case "vc": target = .word(form)
        case "chardev": target = .device(String(rest))
        case "file", "pipe": target = .path(scheme: scheme, String(rest))
        case "udp": target = .datagram(String(rest))
        case "unix":
            let parts = KeyValue.split(String(rest))
            target = .socket(parts[0])
            settings = try Self.settings(parts)
        case _ where Self.networks.contains(scheme):
            let parts = KeyValue.split(String(rest))
            guard let colon = parts[0].firstIndex(of: ":") else {
                target = .other(form)
                return
            }
            let port = parts[0][parts[0].index(after: colon)...]
            target = .network(scheme: scheme, host: String(parts[0][..<colon]), port: String(port))
            settings = try Self.settings(parts)
        default: target = .other(form)
        }
    }

    private static func settings(_ parts: [String]) throws -> BlockOptions {
        try BlockOptions(parsing: parts.dropFirst().map(KeyValue.escape).joined(separator: ","))
    }

    /// Whether QEMU makes the socket and waits there for others.
    var isServer: Bool { settings.isOn("server") }

    /// As QEMU is given it.
    var text: String {
        let more = settings.text.isEmpty ? "" : ",\(settings.text)"
        let body =
            switch target {
            case .word(let word), .other(let word): word
            case .device(let id): "chardev:\(id)"
            case .path(let scheme, let path): "\(scheme):\(path)"
            case .socket(let path): "unix:\(KeyValue.escape(path))\(more)"
            case .network(let scheme, let host, let port): "\(scheme):\(host):\(KeyValue.escape(port))\(more)"
            case .datagram(let addresses): "udp:\(addresses)"
            }
        return (hasMonitor ? "mon:" : "") + body
    }

    /// Whether addresses of UDP have their form: `HOST:PORT`, twice with an `@` in between.
    static func isDatagram(_ text: String) -> Bool {
        let ends = text.split(separator: "@", omittingEmptySubsequences: false)
        return ends.count <= 2
            && ends.allSatisfy { end in
                let fields = end.split(separator: ":", omittingEmptySubsequences: false)
                return fields.count == 2 && PeerText.isHost(fields[0])
                    && (fields[1].isEmpty || PeerText.isPort(fields[1]))
            }
    }
}
