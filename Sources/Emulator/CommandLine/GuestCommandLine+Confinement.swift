internal import IO

extension GuestCommandLine {
    /// Options with which a command line chooses what its QEMU may do; on a destination the host chooses.
    private static let choices: Set<String> = ["sandbox", "runas", "chroot"]

    /// The command line for a QEMU whose confinement is the host's affair.
    ///
    /// - Parameter memory: gets the place of a file of memory, and says in which directory QEMU shall make it.
    func confined(memory: (String) throws -> String) throws -> GuestCommandLine {
        let kept: [GuestOption] = try options().compactMap { option in
            if Self.choices.contains(option.name) { return nil }
            switch option.name {
            case "run-with":
                var settings = try BlockOptions(parsing: option.argument ?? "")
                for key in ["user", "chroot"] { settings.remove(key) }
                return settings.leaves.isEmpty ? nil : GuestOption(option.name, settings.text)
            case "mem-path": return GuestOption(option.name, try memory(option.argument ?? ""))
            case "netdev", "nic", "net":
                var settings = try BlockOptions(parsing: option.argument ?? "", implied: "type")
                guard settings["type"] == "tap", !settings.has("fd"), !settings.has("fds") else { return option }
                // Without these QEMU runs scripts of this host.
                for key in ["script", "downscript"] { settings.set(key, .string("no")) }
                return GuestOption(option.name, settings.text)
            case "object":
                var settings = try BlockOptions(parsing: option.argument ?? "", implied: "qom-type")
                guard settings["qom-type"] == "memory-backend-file", let path = settings["mem-path"] else {
                    return option
                }
                settings.set("mem-path", .string(try memory(path)))
                return GuestOption(option.name, settings.text)
            default: return option
            }
        }
        return GuestCommandLine(program: program, options: kept, directory: directory)
    }

    /// The devices and files of the host that the options name or imply, besides those of `paths`.
    func hostFiles() throws -> [Confinement.Rule] {
        var rules: [Confinement.Rule] = []
        func add(_ path: String, _ rights: Confinement.Rights) {
            rules.append(.init(path, rights, isOptional: true))
        }
        for option in try options() {
            let argument = option.argument ?? ""
            switch option.name {
            case "enable-kvm": add("/dev/kvm", .device)
            case "accel", "machine", "M": if argument.contains("kvm") { add("/dev/kvm", .device) }
            case "netdev", "nic", "net":
                let settings = try BlockOptions(parsing: argument, implied: "type")
                guard ["tap", "bridge"].contains(settings["type"]) else { continue }
                add("/dev/net/tun", .device)
                if settings.has("vhost") || settings.has("vhostforce") { add("/dev/vhost-net", .device) }
            case "serial", "parallel", "debugcon", "chardev":
                guard ["pty", "mon:pty"].contains(argument) || argument.hasPrefix("pty,") else { continue }
                add("/dev/ptmx", .device)
                add("/dev/pts", .device.union(.list))
            case "mem-path": add(argument, .directory)
            case "object":
                let settings = try BlockOptions(parsing: argument, implied: "qom-type")
                if let path = settings["mem-path"] { add(path, .directory) }
                if settings["qom-type"] == "rng-random" { add(settings["filename"] ?? "/dev/urandom", .read) }
                if let path = settings["dir"] { add(path, .reading) }
            default: continue
            }
        }
        return rules
    }

    /// Whether all of the guest's memory shall be locked.
    var locksMemory: Bool {
        ((try? options()) ?? []).contains { option in
            guard let settings = try? BlockOptions(parsing: option.argument ?? "") else { return false }
            return option.name == "overcommit" && settings.isOn("mem-lock") || option.name == "realtime"
        }
    }

    /// The TCP ports on which displays, serial ports and the networks of the guest may listen.
    func listeningPorts() throws -> Set<UInt16> {
        var ports: Set<UInt16> = []
        func add(_ first: Int?, through last: Int? = nil) {
            guard let first, first > 0, first <= 65535 else { return }
            for port in first...max(first, min(last ?? first, 65535)) { ports.insert(UInt16(port)) }
        }
        for option in try options() {
            let argument = option.argument ?? ""
            let parts = KeyValue.split(argument)
            func value(_ key: String) -> String? {
                parts.first { $0.hasPrefix("\(key)=") }.map { String($0.dropFirst(key.utf8.count + 1)) }
            }
            switch option.name {
            case "vnc":
                guard let first = parts.first, let colon = first.lastIndex(of: ":"),
                    let display = Int(first[first.index(after: colon)...]), display >= 0, display < 60000
                else { continue }
                // A display that is taken moves on to the next one, and its other port with it.
                let last = min(value("to").flatMap { Int($0) } ?? display, 60000)
                let further = max(last - display, 0)
                add(5900 + display, through: 5900 + display + further)
                guard let socket = value("websocket") ?? (parts.contains("websocket") ? "on" : nil) else { continue }
                let other = BlockOptions.truth(socket) == true ? 5700 + display : Int(socket)
                add(other, through: other.map { $0 + further })
            case "spice": for key in ["port", "tls-port"] { add(value(key).flatMap { Int($0) }) }
            case "serial", "parallel", "debugcon":
                guard let form = parts.first, let colon = form.lastIndex(of: ":"),
                    ["tcp:", "telnet:", "websocket:"].contains(where: form.hasPrefix),
                    let port = Int(form[form.index(after: colon)...])
                else { continue }
                add(port, through: value("to").flatMap { Int($0) })
            case "chardev":
                let settings = try BlockOptions(parsing: argument, implied: "backend")
                guard settings["backend"] == "socket" else { continue }
                add(settings["port"].flatMap { Int($0) }, through: settings["to"].flatMap { Int($0) })
            case "netdev", "nic", "net":
                let settings = try BlockOptions(parsing: argument, implied: "type")
                for part in parts where part.hasPrefix("hostfwd=") {
                    let own = part.dropFirst("hostfwd=".utf8.count).prefix { $0 != "-" }
                    guard let colon = own.lastIndex(of: ":"), !own.hasPrefix("udp:") else { continue }
                    add(Int(own[own.index(after: colon)...]))
                }
                if let listen = settings["listen"], let colon = listen.lastIndex(of: ":") {
                    add(Int(listen[listen.index(after: colon)...]))
                }
                if settings.isOn("server") { add(settings["addr.port"].flatMap { Int($0) }) }
            default: continue
            }
        }
        return ports
    }
}
