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
        var ports: [HostPort] = []
        for option in try options() {
            let argument = option.argument ?? ""
            func add(_ host: String, _ port: String, isDatagram: Bool = false) {
                guard let number = Int(port), number > 0, number < 65536 else { return }
                ports.append(HostPort(host: host, port: number, isDatagram: isDatagram, option: "-\(option.name)"))
            }
            switch option.name {
            case "netdev", "nic", "net":
                // hostfwd=[tcp|udp]:[address]:port-[guest address]:port, as often as one likes.
                for part in KeyValue.split(argument) where part.hasPrefix("hostfwd=") {
                    let fields = part.dropFirst(8).prefix { $0 != "-" }.split(
                        separator: ":",
                        omittingEmptySubsequences: false
                    )
                    guard fields.count == 3 else { continue }
                    add(String(fields[1]), String(fields[2]), isDatagram: fields[0] == "udp")
                }
            case "chardev":
                let settings = try BlockOptions(parsing: argument, implied: "backend")
                guard settings["backend"] == "socket", settings.isOn("server"), let port = settings["port"] else {
                    continue
                }
                add(settings["host"] ?? "", port)
            case "serial", "monitor", "qmp", "parallel", "gdb", "debugcon":
                let parts = KeyValue.split(argument)
                guard let first = parts.first, first.hasPrefix("tcp:"),
                    parts.contains(where: { $0 == "server" || $0 == "server=on" }), let colon = first.lastIndex(of: ":")
                else { continue }
                add(String(first.dropFirst(4)[..<colon]), String(first[first.index(after: colon)...]))
            case "spice":
                if let port = option.value("port") { add(option.value("addr") ?? "", port) }
            case "vnc":
                let parts = KeyValue.split(argument)
                // A display that may move on looks for its port itself.
                guard let first = parts.first, let colon = first.lastIndex(of: ":"),
                    !parts.contains(where: { $0.hasPrefix("to=") || $0.hasPrefix("reverse") }),
                    let display = Int(first[first.index(after: colon)...])
                else { continue }
                add(String(first[..<colon]), "\(5900 + display)")
            default: continue
            }
        }
        return ports
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
