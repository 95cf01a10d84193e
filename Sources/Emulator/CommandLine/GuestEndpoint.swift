/// An address of the network that QEMU listens on for a guest, or that it connects to.
public struct GuestEndpoint: Sendable, Hashable {
    /// What QEMU does with the address.
    public enum Role: Sendable, Hashable {
        /// It waits there for others, or takes datagrams there.
        case listens
        /// It sends there first.
        case connects
    }

    /// The option that wants it: "-serial".
    public var option: String
    /// What QEMU does with it.
    public var role: Role
    /// A name or an address as it is written; "" for all of this host. Nil for whatever the guest likes to connect to.
    public var host: String?
    /// The ports, one of which it gets; nil when they are not known, or the system chooses.
    public var ports: ClosedRange<UInt16>?
    /// Whether it is UDP.
    public var isDatagram: Bool

    /// Describes an address.
    public init(
        _ option: String,
        _ role: Role,
        host: String?,
        ports: ClosedRange<UInt16>? = nil,
        isDatagram: Bool = false
    ) {
        self.option = option
        self.role = role
        self.host = host
        self.ports = ports
        self.isDatagram = isDatagram
    }

    /// A port that a peer wrote, up to another one; nil for what is no port.
    static func ports(_ first: Int?, through last: Int? = nil) -> ClosedRange<UInt16>? {
        guard let first, first > 0, first <= 65535 else { return nil }
        return UInt16(first)...UInt16(max(first, min(last ?? first, 65535)))
    }

    /// The host and the port of `HOST:PORT`, where the host may be missing or in brackets.
    static func split(_ text: some StringProtocol) -> (host: String, port: Int?) {
        guard let colon = text.lastIndex(of: ":") else { return (String(text), nil) }
        return (String(text[..<colon]), Int(text[text.index(after: colon)...]))
    }
}

extension ParsedOption {
    func listening(on host: String, _ ports: ClosedRange<UInt16>?, isDatagram: Bool = false) -> GuestEndpoint {
        GuestEndpoint("-\(name)", .listens, host: host, ports: ports, isDatagram: isDatagram)
    }

    /// - Parameter text: `HOST:PORT`.
    func listening(on text: some StringProtocol, isDatagram: Bool = false) -> GuestEndpoint {
        let (host, port) = GuestEndpoint.split(text)
        return listening(on: host, GuestEndpoint.ports(port), isDatagram: isDatagram)
    }

    func connecting(to host: String?, port: Int? = nil, isDatagram: Bool = false) -> GuestEndpoint {
        GuestEndpoint("-\(name)", .connects, host: host, ports: GuestEndpoint.ports(port), isDatagram: isDatagram)
    }

    /// - Parameter text: `HOST:PORT`.
    func connecting(toAddress text: some StringProtocol, isDatagram: Bool = false) -> GuestEndpoint {
        let (host, port) = GuestEndpoint.split(text)
        return connecting(to: host, port: port, isDatagram: isDatagram)
    }
}

extension GuestCommandLine {
    /// Every address of the network that QEMU listens on or connects to.
    ///
    /// - Throws: `GuestError` for an option that cannot be read.
    public func endpoints() throws -> [GuestEndpoint] {
        let options = try options()
        var found = try options.flatMap {
            let option = try ParsedOption(ofOriginal: $0)
            return try option.rule.endpoints(option)
        }
        // Without a word about networks, QEMU makes one that reaches everything.
        if !options.contains(where: { ["netdev", "nic", "net", "nodefaults"].contains($0.name) }) {
            found.append(GuestEndpoint("-nic user, QEMU's default,", .connects, host: nil))
        }
        return found
    }

    /// The TCP ports on which displays, serial ports and the networks of the guest may listen.
    func listeningPorts() throws -> Set<UInt16> {
        Set(try endpoints().filter { $0.role == .listens && !$0.isDatagram }.flatMap { $0.ports.map(Array.init) ?? [] })
    }
}
