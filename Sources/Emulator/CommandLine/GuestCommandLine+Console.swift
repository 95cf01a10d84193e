extension GuestCommandLine {
    /// A Unix socket at which a serial port, or another character device without a monitor, takes its one client.
    public struct SerialSocket: Sendable, Hashable {
        /// What it is called: `serial0` for the first `-serial`, or the id of a `-chardev`.
        public let name: String
        /// As it is written.
        public let path: String
    }

    /// The sockets that can be a guest's console, each under all of its names. One that a monitor has too is none: who writes there commands QEMU.
    public var serialSockets: [SerialSocket] {
        guard let options = try? options() else { return [] }
        let monitors = Set(options.compactMap(Self.monitorDevice))
        // Other protocols have bytes of their own among those of the guest.
        func isPlain(_ settings: BlockOptions) -> Bool {
            settings.isOn("server") && !["telnet", "tn3270", "websocket", "abstract"].contains { settings.isOn($0) }
                && settings["tls-creds"] == nil
        }
        var devices: [SerialSocket] = []
        for option in options where option.name == "chardev" {
            guard let settings = try? BlockOptions(parsing: option.argument ?? "", implied: "backend"),
                settings["backend"] == "socket", isPlain(settings), let path = settings["path"],
                let id = settings["id"], !monitors.contains(id)
            else { continue }
            devices.append(SerialSocket(name: id, path: path))
        }
        var ports: [SerialSocket] = []
        for (index, option) in options.filter({ $0.name == "serial" }).enumerated() {
            guard let address = try? CharacterAddress(option.argument ?? ""), !address.hasMonitor else { continue }
            switch address.target {
            case .socket(let path) where isPlain(address.settings):
                ports.append(SerialSocket(name: "serial\(index)", path: path))
            case .device(let id):
                guard let device = devices.first(where: { $0.name == id }) else { continue }
                ports.append(SerialSocket(name: "serial\(index)", path: device.path))
            default: continue
            }
        }
        return ports + devices
    }

    /// The socket of a name, or of the number of a `-serial`.
    ///
    /// - Throws: `GuestError` that says which there are.
    public func serialSocket(_ name: String) throws -> SerialSocket {
        let sockets = serialSockets
        let wanted = !name.isEmpty && name.utf8.allSatisfy { (48...57).contains($0) } ? "serial\(name)" : name
        if let found = sockets.first(where: { $0.name == wanted }) { return found }
        let known = sockets.map { "\($0.name) (\($0.path))" }.joined(separator: ", ")
        throw GuestError(
            "The guest has no serial socket '\(name)': "
                + (known.isEmpty
                    ? "its command line names no Unix socket for one; give QEMU -serial unix:PATH,server=on,wait=off"
                    : "its command line names \(known)")
        )
    }
}
