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
                guard let address = try? CharacterAddress(argument), case .socket(let path) = address.target else {
                    return option
                }
                let new = next(path, ["monitor", "qmp", "qmp-pretty"].contains(option.name))
                let prefix = address.hasMonitor ? "mon:unix:" : "unix:"
                let tail = argument.dropFirst(prefix.count + KeyValue.escape(path).count)
                return GuestOption(option.name, "\(prefix)\(KeyValue.escape(new))\(tail)")
            case "chardev":
                guard var settings = try? BlockOptions(parsing: argument, implied: "backend"),
                    settings["backend"] == "socket", settings.isOn("server"), !settings.isOn("abstract"),
                    let path = settings["path"]
                else { return option }
                let isMonitor = settings["id"].map(monitors.contains) ?? false && !settings.isOn("mux")
                let new = next(path, isMonitor)
                settings.set("path", .string(new))
                return GuestOption("chardev", settings.text)
            default: return option
            }
        }
        return GuestCommandLine(program: program, options: placed, directory: directory)
    }
}
