internal import IO

extension GuestCommandLine {
    /// A port of the host that QEMU opens for the guest.
    public struct HostPort: Sendable, Hashable {
        /// The address; "" for all.
        public var host: String
        /// The port.
        public var port: Int
        /// Whether it is UDP.
        public var isDatagram: Bool
        /// The option that wants it.
        public var option: String
    }

    /// The ports that QEMU would listen on.
    public func hostPorts() throws -> [HostPort] {
        try options().flatMap { try Self.ports(of: ParsedOption(ofOriginal: $0)) }
    }

    private static func ports(of option: ParsedOption) throws -> [HostPort] {
        func port(_ host: some StringProtocol, _ port: some StringProtocol, isDatagram: Bool = false) -> [HostPort] {
            guard let number = Int(port), (1..<65536).contains(number) else { return [] }
            return [HostPort(host: String(host), port: number, isDatagram: isDatagram, option: "-\(option.name)")]
        }
        let settings = option.settings
        switch option.name {
        case "netdev", "nic", "net":
            // hostfwd=[tcp|udp]:[address]:port-[guest address]:port, as often as one likes.
            return settings.leaves.filter { $0.key == "hostfwd" || $0.key.hasPrefix("hostfwd.") }.flatMap { forward in
                let fields = forward.value.prefix { $0 != "-" }.split(separator: ":", omittingEmptySubsequences: false)
                return fields.count == 3 ? port(fields[1], fields[2], isDatagram: fields[0] == "udp") : []
            }
        case "chardev":
            guard settings["backend"] == "socket", settings.isOn("server"), let number = settings["port"] else {
                return []
            }
            return port(settings["host"] ?? "", number)
        case "serial", "monitor", "qmp", "qmp-pretty", "parallel", "gdb", "debugcon":
            let address = try CharacterAddress(option.argument)
            guard case .network(_, let host, let number) = address.target, address.isServer else { return [] }
            return port(host, number)
        case "spice": return settings["port"].map { port(settings["addr"] ?? "", $0) } ?? []
        case "vnc":
            // A display that may move on looks for its port itself.
            guard let address = settings["vnc"], let colon = address.lastIndex(of: ":"), !settings.has("to"),
                !settings.has("reverse"), let display = Int(address[address.index(after: colon)...]),
                (0..<60000).contains(display)
            else { return [] }
            return port(address[..<colon], "\(5900 + display)")
        default: return []
        }
    }

    /// The directories of huge pages that the guest's memory is in.
    public func hugePages() throws -> [String] {
        try options().compactMap { option in
            if option.name == "mem-path" { return option.argument }
            guard option.name == "object" else { return nil }
            return try ParsedOption(ofOriginal: option).settings["mem-path"]
        }
    }

    /// The bridges that the guest's networks are part of.
    public func bridges() throws -> [String] {
        try options().compactMap { option in
            guard ["netdev", "nic", "net"].contains(option.name) else { return nil }
            let settings = try BlockOptions(parsing: option.argument ?? "", implied: "type")
            guard settings["type"] == "bridge" || settings["type"] == "tap" && settings.has("br") else { return nil }
            return settings["br"] ?? "br0"
        }
    }
}
