internal import IO

extension GuestCommandLine {
    /// A Unix socket that QEMU makes for a character device.
    public struct Socket: Sendable, Hashable {
        /// As it is written.
        public let path: String
        /// Whether a monitor says its greeting there.
        public let isMonitor: Bool
    }

    /// The Unix sockets of the guest's character devices, in the order of the command line.
    public var sockets: [Socket] {
        var found: [Socket] = []
        _ = placingSockets { _, socket in
            found.append(socket)
            return socket.path
        }
        return found
    }

    /// The command line with these sockets in other places.
    ///
    /// - Parameter place: gets the number of a socket, from 0, and the socket.
    func placingSockets(_ place: (Int, Socket) -> String) -> GuestCommandLine {
        guard let options = try? options() else { return self }
        let monitors = Set(options.filter { $0.name != "gdb" }.compactMap(Self.monitorDevice))
        var count = 0
        func next(_ path: String, _ isMonitor: Bool) -> String {
            defer { count += 1 }
            return place(count, Socket(path: path, isMonitor: isMonitor))
        }
        let placed = options.map { option in
            let argument = option.argument ?? ""
            switch option.name {
            case "serial", "monitor", "qmp", "qmp-pretty", "parallel", "debugcon", "gdb":
                let prefix = argument.hasPrefix("mon:") ? "mon:unix:" : "unix:"
                guard argument.hasPrefix(prefix) else { return option }
                let rest = argument.dropFirst(prefix.count)
                let comma = rest.firstIndex(of: ",") ?? rest.endIndex
                let path = next(String(rest[..<comma]), ["monitor", "qmp", "qmp-pretty"].contains(option.name))
                return GuestOption(option.name, "\(prefix)\(path)\(rest[comma...])")
            case "chardev":
                guard let settings = try? BlockOptions(parsing: argument, implied: "backend"),
                    settings["backend"] == "socket", settings.isOn("server"), !settings.isOn("abstract"),
                    let path = settings["path"]
                else { return option }
                let isMonitor = settings["id"].map(monitors.contains) ?? false && !settings.isOn("mux")
                let new = next(path, isMonitor)
                let parts = KeyValue.split(argument).map { $0.hasPrefix("path=") ? "path=\(new)" : $0 }
                return GuestOption("chardev", parts.map(KeyValue.escape).joined(separator: ","))
            default: return option
            }
        }
        return GuestCommandLine(program: program, options: placed, directory: directory)
    }
}
