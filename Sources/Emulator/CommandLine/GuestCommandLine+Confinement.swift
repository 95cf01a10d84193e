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
}
