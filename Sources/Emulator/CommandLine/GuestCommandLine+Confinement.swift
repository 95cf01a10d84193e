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
        try options().flatMap { option in
            let option = try ParsedOption(ofOriginal: option)
            return option.rule.hostFiles(option)
        }
    }

    /// Whether all of the guest's memory shall be locked.
    var locksMemory: Bool {
        ((try? options()) ?? []).contains { option in
            guard let settings = try? BlockOptions(parsing: option.argument ?? "") else { return false }
            return option.name == "overcommit" && settings.isOn("mem-lock") || option.name == "realtime"
        }
    }
}
