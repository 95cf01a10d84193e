internal import IO

/// Displays, sound and keyboards.
extension OptionRule {
    static let displays: [OptionRule] =
        [
            OptionRule(
                "vnc",
                argument: .settings("vnc"),
                blank: .leftOut,
                check: checkVNC,
                relocate: placeVNC,
                endpoints: endpointsOfVNC
            ),
            OptionRule(
                "spice",
                argument: .settings(),
                repeatable: ["tls-channel", "plaintext-channel"],
                blank: .emptied { copy, _ in copy.hasSpice = true },
                check: checkSpice,
                relocate: placeSpice,
                endpoints: endpointsOfSpice
            ),
            OptionRule("display", argument: .object("type"), blank: .leftOut, check: checkDisplay, relocate: hide),
            OptionRule(
                "audiodev",
                argument: .object("driver"),
                blank: .emptied(silence),
                check: checkSound,
                endpoints: { option in option.settings["server"].map { _ in [option.connecting(to: nil)] } ?? [] }
            ),
            OptionRule("vga-fd", owner: .nobody("it passes a descriptor"), blank: .leftOut),
            OptionRule("nographic", argument: .none, blank: .leftOut),
        ]
        + each("sdl curses", argument: .none, blank: .leftOut, relocate: hide)
        + each("full-screen no-quit show-cursor", argument: .none, relocate: leaveBehind)
        + each("alt-grab ctrl-grab portrait", argument: .none)
        + each("vga k g rotate", argument: .text, check: checkWord)

    /// Displays that are windows of whoever started the guest.
    private static let windows: Set<String> = ["gtk", "sdl", "curses", "cocoa", "spice-app", "none"]

    @Sendable private static func checkDisplay(_ option: ParsedOption) throws {
        guard windows.contains(option.settings["type"] ?? "") else {
            throw option.refusal("it opens something on this host that is no window")
        }
    }

    @Sendable private static func hide(_ option: inout ParsedOption) -> Relocation {
        option.isAtHome ? .written : .replaced([GuestOption("display", "none")])
    }

    // MARK: VNC

    /// Display N is at the port 5900 + N.
    private static let lastDisplay: UInt32 = 65535 - 5900

    private static func display(of address: String) -> String {
        String(address[(address.lastIndex(of: ":").map(address.index(after:)) ?? address.startIndex)...])
    }

    @Sendable private static func checkVNC(_ option: ParsedOption) throws {
        try option.allow([
            "vnc", "share", "display", "head", "sasl", "sasl-authz", "tls-creds", "tls-authz", "websocket",
            "lock-key-sync", "key-delay-ms", "password", "password-secret", "to", "ipv4", "ipv6", "audiodev",
            "power-control", "connections", "non-adaptive", "lossy", "acl",
        ])
        guard option.settings.leaves.first?.key == "vnc", let address = option.settings["vnc"] else {
            throw option.refusal("its address is not its first word")
        }
        if !address.hasPrefix("unix:"), address.contains("/") { throw option.refusal("its address is a path") }
        let numbers = [
            address.hasPrefix("unix:") || address == "none" ? nil : display(of: address), option.settings["to"],
        ]
        for number in numbers.compactMap({ $0 }) where !(UInt32(number).map { $0 <= lastDisplay } ?? false) {
            throw option.refusal("the display '\(number)' is no number from 0 to \(lastDisplay)")
        }
        if let other = option.settings["websocket"], other.contains("/") || other.hasPrefix("unix") {
            throw option.refusal("'websocket' is a path of this host")
        }
    }

    /// The number of a display may be taken on the other host: the next free one will do.
    @Sendable private static func placeVNC(_ option: inout ParsedOption) throws -> Relocation {
        guard let address = option.settings["vnc"] else { return .written }
        if address.hasPrefix("unix:") {
            option.set("vnc", "unix:\(try option.placement(.output, String(address.dropFirst(5))).path)")
        } else if !option.isAtHome, address.contains(":"), !option.settings.has("to"), !option.settings.isOn("reverse")
        {
            // QEMU takes the last display that it may have, not how many it may try.
            let display = UInt32(display(of: address)) ?? 0
            option.set("to", "\(min(display + 99, lastDisplay))")
        }
        return .written
    }

    @Sendable private static func endpointsOfVNC(_ option: ParsedOption) -> [GuestEndpoint] {
        let settings = option.settings
        guard let address = settings["vnc"] else { return [] }
        guard !address.hasPrefix("unix:"), address.contains(":") else {
            // Its WebSocket listens on the network all the same.
            guard let socket = settings["websocket"], BlockOptions.truth(socket) != false else { return [] }
            let (host, port) = socket.contains(":") ? GuestEndpoint.split(socket) : ("", Int(socket))
            return [option.listening(on: host, GuestEndpoint.ports(port))]
        }
        let (host, display) = GuestEndpoint.split(address)
        if settings.isOn("reverse") { return [option.connecting(to: host, port: display)] }
        // A display that is taken moves on to the next one, and its other port with it.
        let first = display.flatMap { (0...Int(lastDisplay)).contains($0) ? $0 : nil }
        let last = max(first ?? 0, min(settings["to"].flatMap { Int($0) } ?? 0, Int(lastDisplay)))
        func ports(_ base: Int?) -> ClosedRange<UInt16>? {
            guard let first, let base, base <= 65535 else { return nil }
            return GuestEndpoint.ports(base, through: base + last - first)
        }
        let near = option.listening(on: host, ports(first.map { 5900 + $0 }))
        guard let socket = settings["websocket"] else { return [near] }
        switch BlockOptions.truth(socket) {
        case true?: return [near, option.listening(on: host, ports(first.map { 5700 + $0 }))]
        case false?: return [near]
        case nil:
            let (own, port) = GuestEndpoint.split(socket)
            // A number alone is a port on the display's address.
            let isPort = !socket.contains(":")
            return [near, option.listening(on: isPort ? host : own, ports(isPort ? Int(socket) : port))]
        }
    }

    // MARK: SPICE

    @Sendable private static func endpointsOfSpice(_ option: ParsedOption) -> [GuestEndpoint] {
        if option.settings.isOn("unix") { return [] }
        return ["port", "tls-port"].compactMap { option.settings[$0] }.map {
            option.listening(on: option.settings["addr"] ?? "", GuestEndpoint.ports(Int($0)))
        }
    }

    private static let spiceFiles = [
        "x509-dir", "x509-key-file", "x509-cert-file", "x509-cacert-file", "x509-dh-key-file",
    ]

    @Sendable private static func checkSpice(_ option: ParsedOption) throws {
        try option.allow(
            Set(spiceFiles).union([
                "port", "tls-port", "addr", "ipv4", "ipv6", "unix", "password", "password-secret", "sasl",
                "disable-ticketing", "disable-copy-paste", "disable-agent-file-xfer", "x509-key-password",
                "tls-ciphers", "tls-channel", "plaintext-channel", "image-compression", "jpeg-wan-compression",
                "zlib-glz-wan-compression", "streaming-video", "video-codecs", "max-refresh-rate", "agent-mouse",
                "playback-compression", "seamless-migration",
            ])
        )
        if let text = option.settings["unix"], BlockOptions.truth(text) == nil {
            throw option.refusal("'unix' is neither on nor off")
        }
        if !option.settings.isOn("unix"), option.settings["addr"]?.contains("/") == true {
            throw option.refusal("its address is a path")
        }
    }

    @Sendable private static func placeSpice(_ option: inout ParsedOption) throws -> Relocation {
        if option.settings.isOn("unix") { try option.place(.output, keys: "addr") }
        for key in spiceFiles { try option.place(.directory, keys: key) }
        return .written
    }

    // MARK: sound

    @Sendable private static func checkSound(_ option: ParsedOption) throws {
        guard option.settings["driver"] != "wav",
            !option.settings.leaves.contains(where: { $0.value.contains("/") || $0.key == "path" })
        else { throw option.refusal("its sound goes to a file or a device of this host") }
    }

    @Sendable private static func silence(_ copy: inout BlankCopy, _ option: ParsedOption) {
        guard let id = option.settings["id"] else { return }
        copy.options.append(GuestOption("audiodev", "none,id=\(KeyValue.escape(id))"))
    }
}
