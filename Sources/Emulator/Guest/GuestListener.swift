/// Where something of a guest's QEMU listens in fact: QEMU may have taken another port than the one that it was asked for.
public struct GuestListener: Sendable, Hashable, Codable {
    /// What it is: `VNC display default`, `character device serial0`.
    public var what: String
    /// The address and the port, or the path of a Unix socket.
    public var address: String
    /// Of a Unix socket: the path under which it is found on each host whose state directory has the same name; nil for none.
    public var stablePath: String?

    /// Names a listener.
    public init(what: String, address: String) {
        (self.what, self.address) = (what, address)
    }

    /// Whether it is on the network, where somebody else may have the port.
    public var isOnNetwork: Bool { !address.hasPrefix("unix:") }
}

extension QMPClient {
    /// What of the guest listens, its displays first; what QEMU does not tell is left out.
    public func listeners() async -> [GuestListener] {
        var found: [GuestListener] = []
        for display in (try? await execute("query-vnc-servers"))?.array ?? [] {
            for server in display["server"]?.array ?? [] {
                let kind = server["websocket"]?.bool == true ? "websocket of VNC display" : "VNC display"
                add(
                    "\(kind) \(display["id"]?.string ?? "")",
                    server["host"]?.string,
                    server["service"]?.string,
                    to: &found
                )
            }
        }
        if let spice = try? await execute("query-spice"), spice["enabled"]?.bool == true {
            for (what, key) in [("SPICE display", "port"), ("SPICE display with TLS", "tls-port")] {
                add(what, spice["host"]?.string, spice[key]?.integer.map { "\($0)" }, to: &found)
            }
        }
        for device in (try? await execute("query-chardev"))?.array ?? [] {
            guard let label = device["label"]?.string, !label.hasPrefix("crossdock-"),
                let name = device["filename"]?.string,
                let address = Self.listening(name)
            else { continue }
            found.append(GuestListener(what: "character device \(label)", address: address))
        }
        return found
    }

    private func add(_ what: String, _ host: String?, _ port: String?, to found: inout [GuestListener]) {
        guard let host, let port else { return }
        // Of a Unix socket the C library makes a host and a service, of which one is its path.
        let path = [host, port].first { $0.hasPrefix("/") }
        let address = path.map { "unix:\($0)" } ?? (host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)")
        found.append(GuestListener(what: what, address: address))
    }

    /// The address of a character device that listens, from QEMU's description of it: `disconnected:tcp:127.0.0.1:4000,server=on`,
    /// `unix:/run/serial,server=on <-> ...`; nil for others.
    static func listening(_ description: String) -> String? {
        var text = Substring(description)
        if text.hasPrefix("disconnected:") { text = text.dropFirst("disconnected:".count) }
        guard let end = text.firstRange(of: ",server=on")?.lowerBound ?? text.firstRange(of: ",server")?.lowerBound
        else {
            return nil
        }
        let address = text[..<end]
        for kind in ["tcp:", "telnet:", "tn3270:", "websocket:"] where address.hasPrefix(kind) {
            return String(address.dropFirst(kind.count))
        }
        return address.hasPrefix("unix:") ? String(address) : nil
    }
}
