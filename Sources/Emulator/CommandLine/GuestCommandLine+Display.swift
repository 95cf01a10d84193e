extension GuestCommandLine {
    /// Where a guest's VNC server listens on its host, for who is on the same host.
    public enum DisplayAddress: Sendable, Hashable {
        /// A Unix socket, by its path as it is written.
        case socket(String)
        /// A port of loopback, one of these: QEMU takes the first that is free.
        case ports(host: String, ClosedRange<UInt16>)
    }

    /// The first VNC server of the command line (`-vnc`, `-display vnc=`) that another process of this host can use.
    ///
    /// - Throws: `GuestError` that says why there is none.
    public func display() throws -> DisplayAddress {
        var refusal: (any Error)?
        for option in try options() {
            let text: String
            switch (option.name, option.argument) {
            case ("vnc", let argument?): text = argument
            case ("display", let argument?) where argument.hasPrefix("vnc="): text = String(argument.dropFirst(4))
            default: continue
            }
            do { if let address = try Self.display(text) { return address } } catch { refusal = refusal ?? error }
        }
        throw refusal
            ?? GuestError(
                "The guest has no VNC display; give QEMU -vnc unix:PATH, and a graphics card such as -vga std"
            )
    }

    /// The address of a `-vnc`; nil for one that listens nowhere.
    private static func display(_ text: String) throws -> DisplayAddress? {
        let settings = try BlockOptions(parsing: text, implied: "vnc")
        guard let address = settings["vnc"], address != "none" else { return nil }
        for key in ["password", "sasl", "reverse"] where settings.isOn(key) {
            throw GuestError("The guest's display has '\(key)=on', which the agent has no use for; \(Self.advice)")
        }
        for key in ["password-secret", "tls-creds"] where settings.has(key) {
            throw GuestError("The guest's display has '\(key)', which the agent has no use for; \(Self.advice)")
        }
        if address.hasPrefix("unix:") { return .socket(String(address.dropFirst(5))) }
        let (host, display) = GuestEndpoint.split(address)
        // Number N is at the port 5900 + N.
        guard let display, (0...(65535 - 5900)).contains(display) else {
            throw GuestError("The guest's display '\(address)' has no number from 0 to \(65535 - 5900)")
        }
        let loopback: String
        switch host {
        case "", "0.0.0.0", "127.0.0.1", "localhost": loopback = "127.0.0.1"
        case "[::1]", "::1", "[::]", "::": loopback = "::1"
        default:
            throw GuestError(
                "The guest's display listens at '\(address)', which is neither a Unix socket nor loopback; \(advice)"
            )
        }
        let last = max(display, min(settings["to"].flatMap { Int($0) } ?? 0, 65535 - 5900))
        return .ports(host: loopback, UInt16(5900 + display)...UInt16(5900 + last))
    }

    private static let advice = "give QEMU -vnc unix:PATH: who may look is asked by the agent"
}
