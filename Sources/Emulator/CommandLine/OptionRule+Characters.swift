internal import IO

/// Serial ports, monitors and the character devices behind them.
extension OptionRule {
    static let characters: [OptionRule] =
        [
            OptionRule(
                "chardev",
                argument: .settings("backend"),
                blank: .emptied(emptyDevice),
                check: checkDevice,
                relocate: placeDevice,
                endpoints: deviceEndpoints,
                hostFiles: terminals
            ),
            OptionRule("mon", argument: .settings("chardev"), blank: .leftOut) {
                try $0.allow(["chardev", "mode", "pretty", "id", "default"])
            },
        ]
        + each(
            "serial parallel debugcon",
            argument: .text,
            blank: .emptied { copy, option in
                let isKept = option.argument == "none" || option.argument.hasPrefix("chardev:")
                copy.options.append(GuestOption(option.name, isKept ? option.argument : "null"))
            },
            check: checkPort,
            relocate: placePort,
            endpoints: portEndpoints,
            hostFiles: terminals
        )
        // The debugger's stub takes a monitor's commands.
        + each(
            "monitor qmp qmp-pretty gdb",
            argument: .text,
            blank: .leftOut,
            check: checkPort,
            relocate: placePort,
            endpoints: portEndpoints
        )

    private static let monitors: Set<String> = ["monitor", "qmp", "qmp-pretty", "gdb"]

    /// What each kind of character device may say.
    private static let backends: [String: Set<String>] = [
        "null": [], "msmouse": [], "wctablet": [], "testdev": [],
        "socket": [
            "host", "port", "to", "ipv4", "ipv6", "path", "server", "wait", "telnet", "tn3270", "websocket", "nodelay",
            "delay", "reconnect", "reconnect-ms", "tls-creds", "tls-authz",
        ],
        "udp": ["host", "port", "localaddr", "localport", "ipv4", "ipv6"],
        "vc": ["width", "height", "cols", "rows"], "ringbuf": ["size"], "file": ["path", "append"], "pipe": ["path"],
        "pty": ["path"], "stdio": ["signal"], "spicevmc": ["name", "debug"], "spiceport": ["name", "debug"],
        "qemu-vdagent": ["mouse", "clipboard"],
    ]

    // MARK: character devices

    @Sendable private static func checkDevice(_ option: ParsedOption) throws {
        let settings = option.settings
        for key in ["fd", "input-path", "in", "out", "abstract"] where settings.has(key) {
            throw option.refusal("'\(key)' belongs to this host")
        }
        guard let backend = settings["backend"], let keys = backends[backend] else {
            throw option.refusal("it is a port of this host")
        }
        try option.allow(keys.union(["backend", "id", "mux", "logfile", "logappend"]))
        guard settings["id"] != nil else { throw option.refusal("it has no id") }
        if backend == "socket", settings["path"] != nil {
            guard settings["host"] == nil, settings["port"] == nil else {
                throw option.refusal("it names two addresses")
            }
            guard settings.isOn("server") else {
                throw option.refusal("it connects to a socket that another program of this host has opened")
            }
        }
    }

    @Sendable private static func placeDevice(_ option: inout ParsedOption) throws -> Relocation {
        if option.settings.has("fd") { throw option.refusal("it passes a descriptor") }
        try option.place(.output, keys: "path", "logfile")
        return .written
    }

    @Sendable private static func emptyDevice(_ copy: inout BlankCopy, _ option: ParsedOption) {
        guard let id = option.settings["id"] else { return }
        let mux = option.settings.isOn("mux") ? ",mux=on" : ""
        copy.options.append(GuestOption("chardev", "null,id=\(KeyValue.escape(id))\(mux)"))
    }

    @Sendable private static func deviceEndpoints(_ option: ParsedOption) -> [GuestEndpoint] {
        let settings = option.settings
        func number(_ key: String) -> Int? { settings[key].flatMap { Int($0) } }
        switch settings["backend"] {
        case "socket" where settings.has("host") || settings.has("port"):
            let (host, port) = (settings["host"] ?? "", number("port"))
            guard settings.isOn("server") else { return [option.connecting(to: host, port: port)] }
            return [option.listening(on: host, GuestEndpoint.ports(port, through: number("to")))]
        case "udp":
            let far = option.connecting(to: settings["host"] ?? "localhost", port: number("port"), isDatagram: true)
            guard settings.has("localaddr") || settings.has("localport") else { return [far] }
            let near = GuestEndpoint.ports(number("localport"))
            return [far, option.listening(on: settings["localaddr"] ?? "", near, isDatagram: true)]
        default: return []
        }
    }

    @Sendable private static func terminals(_ option: ParsedOption) -> [Confinement.Rule] {
        let isTerminal = ["pty", "mon:pty"].contains(option.argument) || option.settings["backend"] == "pty"
        guard isTerminal else { return [] }
        return [
            .init("/dev/ptmx", .device, isOptional: true), .init("/dev/pts", .device.union(.list), isOptional: true),
        ]
    }

    /// Whether a monitor on a character device stays within the guest's own directory.
    ///
    /// A virtual console does not: whoever reaches the guest's display can switch to it.
    static func isPrivate(monitor device: GuestOption) -> Bool {
        guard let settings = try? BlockOptions(parsing: device.argument ?? "", implied: "backend") else { return false }
        switch settings["backend"] {
        case "null": return true
        case "socket":
            return settings["path"] != nil && settings.isOn("server") && !settings.has("fd")
                && !settings.has("abstract")
        default: return false
        }
    }

    // MARK: devices in one word

    /// What may follow the address.
    private static let portKeys: Set<String> = [
        "server", "wait", "nodelay", "delay", "telnet", "websocket", "tn3270", "reconnect", "reconnect-ms", "to",
        "ipv4", "ipv6", "mux",
    ]

    @Sendable private static func checkPort(_ option: ParsedOption) throws {
        let address = try CharacterAddress(option.argument)
        let isMonitor = address.hasMonitor || monitors.contains(option.name)
        if let reason = address.settings.ambiguity() { throw option.refusal(reason) }
        for leaf in address.settings.leaves where !portKeys.contains(leaf.key) {
            throw option.refusal("'\(leaf.key)' is not known to be harmless")
        }
        switch address.target {
        case .word(let word):
            guard PeerText.isWord(word) else { throw option.refusal("it is more than a word") }
        case .device(let id):
            // A monitor on a character device that others reach was left out before.
            guard PeerText.isIdentifier(id), !address.hasMonitor else {
                throw option.refusal("'\(id)' is no id of a character device")
            }
        case .socket:
            guard address.isServer else {
                throw option.refusal("it connects to a socket that another program of this host has opened")
            }
        case .path where !isMonitor: break
        case .network(_, let host, let port) where !isMonitor:
            guard PeerText.isHost(host[...]), PeerText.isPort(port[...]) else {
                throw option.refusal("its address is not HOST:PORT")
            }
        case .datagram(let addresses) where !isMonitor:
            guard CharacterAddress.isDatagram(addresses) else {
                throw option.refusal("its addresses are not HOST:PORT@HOST:PORT")
            }
        default:
            throw option.refusal(
                isMonitor
                    ? "a monitor must not be open to others on the other host; give it a Unix socket"
                    : "it is a port of this host"
            )
        }
    }

    @Sendable private static func portEndpoints(_ option: ParsedOption) throws -> [GuestEndpoint] {
        let address = try CharacterAddress(option.argument)
        switch address.target {
        case .network(_, let host, let port):
            guard address.isServer else { return [option.connecting(to: host, port: Int(port))] }
            let last = address.settings["to"].flatMap { Int($0) }
            return [option.listening(on: host, GuestEndpoint.ports(Int(port), through: last))]
        case .datagram(let addresses):
            let ends = addresses.split(separator: "@", omittingEmptySubsequences: false)
            return ends.prefix(1).map { option.connecting(toAddress: $0, isDatagram: true) }
                + ends.dropFirst().map { option.listening(on: $0, isDatagram: true) }
        default: return []
        }
    }

    @Sendable private static func placePort(_ option: inout ParsedOption) throws -> Relocation {
        var address = try CharacterAddress(option.argument)
        switch address.target {
        case .path(let scheme, let path):
            address.target = .path(scheme: scheme, try option.placement(.output, path).path)
        case .socket(let path):
            let new = try option.placement(.output, path).path
            if option.isAtHome, new == path { return .written }
            address.target = .socket(new)
        case .word(let word) where !option.isAtHome && word != "none" && word != "null":
            // Who reaches the display, or the terminal, would reach the monitor.
            if option.name == "monitor" { return .replaced([GuestOption("monitor", "none")]) }
            if monitors.contains(option.name) { return .leftOut }
            address.hasMonitor = false
        case .other where option.argument.hasPrefix("/dev/") || option.argument.hasPrefix("mon:/dev/"):
            throw option.refusal("it is a port of this host")
        default: if option.isAtHome { return .written }
        }
        return .replaced([GuestOption(option.name, address.text)])
    }
}
