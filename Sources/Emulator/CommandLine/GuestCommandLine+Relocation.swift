internal import IO
internal import TLS

extension GuestCommandLine {
    private typealias Place = (PathReference) throws -> Placement

    /// What cannot be moved, with the reason.
    private static let refused: [String: String] = [
        "incoming": "the guest itself waits for a migration",
        "snapshot": "its writes go to temporary files",
        "loadvm": "it starts from an internal snapshot",
        "readconfig": "its options are in another file",
        "virtfs": "a shared directory has no counterpart on the other host",
        "fsdev": "a shared directory has no counterpart on the other host",
        "hdachs": "it is obsolete",
        "vga-fd": "it passes a descriptor",
        "add-fd": "it passes a descriptor",
        "xen-domid": "Xen guests are not supported",
        "chroot": "the other host has another directory tree",
        "tpmdev": "the TPM's state is kept outside of QEMU",
        "preconfig": "it waits for a monitor to configure it",
    ]
    /// Devices that are part of this host.
    private static let hostDevices = [
        "vfio-", "vhost-", "usb-host", "usb-mtp", "pci-assign", "ivshmem-doorbell", "virtio-input-host", "ccid-card-",
        "guest-loader", "u2f-", "ipmi-bmc-extern", "tpm-", "xen-", "pvrdma", "virtio-9p",
    ]
    /// Displays that are windows of whoever started the guest.
    static let windows = ["gtk", "sdl", "curses", "cocoa", "spice-app"]
    /// Objects that are part of this host.
    private static let hostObjects = ["input-linux", "memory-backend-epc", "x-remote-object", "x-vfio-user-server"]

    /// Rewrites the command line for a host.
    ///
    /// - Parameters:
    ///   - isAtHome: whether the guest is only started here, where it was described: its secrets and ports are right.
    ///   - facts: the QEMU that shall read it; when nil, options stay in the form that they have.
    ///   - origin: what is known of the guest beyond its command line.
    ///   - place: gets every path with its kind, and says where it is on this host.
    /// - Returns: the command line. `-daemonize`, `-pidfile` and `-S` are left out, since the agent supervises QEMU.
    /// - Throws: `GuestError` naming an option that cannot be moved; also what `place` throws.
    public func relocated(
        isAtHome: Bool = false,
        for facts: EmulatorFacts? = nil,
        origin: Origin = Origin(),
        _ place: (PathReference) throws -> Placement
    ) throws -> Relocation {
        let options = isAtHome ? try options() : Self.monitorForms(try options())
        var nodes = try BlockNodeSet(options.filter { $0.name == "blockdev" })
        try nodes.relocate(place)
        var result = Relocation(arguments: [program], changes: [], secrets: [])
        var definition = 0
        let publicMonitors = isAtHome ? [] : Self.publicMonitors(options)
        for option in options {
            let new: [GuestOption]
            if Self.isPart(option, of: publicMonitors) {
                new = []
            } else if option.name == "blockdev" {
                new = nodes.text(definition).map { [GuestOption("blockdev", $0)] } ?? []
                definition += 1
            } else if let secret = Self.carriedSecret(option) {
                result.secrets.append(secret)
                new = []
            } else {
                var placed = try Self.relocate(option, isAtHome: isAtHome, place)
                if let facts, let option = placed {
                    placed = try Self.adapted(option, to: facts, origin)
                }
                new = placed.map { [$0] } ?? []
            }
            result.arguments += GuestOption.words(new)
            if new != [option] {
                let before = GuestOption.words([option]).joined(separator: " ")
                let after = new.isEmpty ? "left out" : GuestOption.words(new).joined(separator: " ")
                result.changes.append("\(before): \(after)")
            }
        }
        return result
    }

    /// The character devices of monitors that are not sockets of the guest's own: those of a management program, or open to
    /// others. On the other host nobody answers there, and nobody should.
    private static func publicMonitors(_ options: [GuestOption]) -> Set<String> {
        var ids: Set<String> = []
        for option in options {
            guard let id = monitorDevice(option) else { continue }
            let device = options.first { $0.name == "chardev" && $0.value("id") == id }
            if device.map({ !OptionPolicy.isPrivate(monitor: $0) }) ?? true { ids.insert(id) }
        }
        return ids
    }

    private static func isPart(_ option: GuestOption, of monitors: Set<String>) -> Bool {
        switch option.name {
        case "chardev": option.value("id").map(monitors.contains) ?? false
        default: monitorDevice(option).map(monitors.contains) ?? false
        }
    }

    /// The id of a secret whose value travels outside of the command line: `-object secret,id=ID` and nothing more.
    private static func carriedSecret(_ option: GuestOption) -> String? {
        guard option.name == "object",
            let options = try? BlockOptions(parsing: option.argument ?? "", implied: "qom-type"),
            options["qom-type"] == "secret", !options.has("file"), !options.has("data")
        else { return nil }
        return options["id"]
    }

    private static func relocate(_ option: GuestOption, isAtHome: Bool, _ place: Place) throws -> GuestOption? {
        let (name, argument) = (option.name, option.argument ?? "")
        if !isAtHome, refused[name] == nil { try OptionPolicy.check(option) }
        if let reason = refused[name] { throw GuestError("A guest with -\(name) cannot be moved: \(reason)") }
        func refusal(_ reason: String) -> GuestError {
            GuestError("A guest with -\(name) \(argument) cannot be moved: \(reason)")
        }
        func path(_ kind: PathKind, _ text: String) throws -> String {
            try place(PathReference(kind: kind, path: text, option: "-\(name)")).path
        }
        func withPath(_ kind: PathKind, keys: [String], implied: String? = nil) throws -> GuestOption {
            var options = try BlockOptions(parsing: argument, implied: implied)
            for key in keys { if let value = options[key] { options.set(key, .string(try path(kind, value))) } }
            return GuestOption(name, options.text)
        }
        switch name {
        case "daemonize", "pidfile", "S": return nil
        case "display" where !isAtHome && windows.contains(where: argument.hasPrefix):
            return GuestOption("display", "none")
        case "sdl" where !isAtHome, "curses" where !isAtHome: return GuestOption("display", "none")
        case "full-screen" where !isAtHome, "no-quit" where !isAtHome, "show-cursor" where !isAtHome: return nil
        case "kernel", "initrd", "dtb", "bios", "option-rom", "cdrom", "shim":
            return GuestOption(name, try path(.file, argument))
        case "hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "mtdblock", "pflash":
            return try plainDisk(option, place)
        case "drive": return GuestOption(name, try drive(argument, place))
        case "D": return GuestOption(name, try path(.output, argument))
        case "trace":
            let moved = try withPath(.output, keys: ["file"], implied: "enable")
            return BlockOptions.value(of: "events", in: argument) == nil ? moved : nil
        case "fw_cfg": return try withPath(.file, keys: ["file"], implied: "name")
        case "smbios": return try withPath(.file, keys: ["file", "path"])
        case "acpitable":
            guard BlockOptions.value(of: "file", in: argument)?.contains(":") != true else {
                throw refusal("it joins several files; give one -acpitable for each")
            }
            return try withPath(.file, keys: ["file", "data"])
        case "boot": return try withPath(.file, keys: ["splash"], implied: "order")
        case "serial", "monitor", "qmp", "qmp-pretty", "parallel", "debugcon", "gdb":
            return GuestOption(name, try characterDevice(argument) { try path(.output, $0) })
        case "chardev":
            let options = try BlockOptions(parsing: argument, implied: "backend")
            if options.has("fd") { throw refusal("it passes a descriptor") }
            var parts = KeyValue.split(argument)
            for (index, part) in parts.enumerated() where part.hasPrefix("path=") || part.hasPrefix("logfile=") {
                let equals = part.firstIndex(of: "=")!
                parts[index] = "\(part[..<equals])=\(try path(.output, String(part[part.index(after: equals)...])))"
            }
            return GuestOption(name, parts.map(KeyValue.escape).joined(separator: ","))
        case "vnc" where isAtHome: return option
        case "vnc": return GuestOption(name, try display(argument) { try path(.output, $0) })
        case "spice":
            let isSocket =
                BlockOptions.value(of: "unix", in: argument).map { ["on", "yes", "true"].contains($0) } ?? false
            return isSocket ? try withPath(.output, keys: ["addr"]) : option
        case "object":
            let options = try BlockOptions(parsing: argument, implied: "qom-type")
            let type = options["qom-type"] ?? ""
            if isAtHome, type.hasPrefix("secret") { return option }
            if type == "secret" || type == "secret_keyring" { throw refusal("it holds a secret of this host") }
            if hostObjects.contains(type) { throw refusal("it is a part of this host") }
            if type == "memory-backend-file", options.isOn("pmem") || options.isOn("readonly") {
                throw refusal("what its file holds would stay behind")
            }
            if type == "filter-dump" { return try withPath(.output, keys: ["file"], implied: "qom-type") }
            return option
        case "netdev", "nic", "net":
            let options = try BlockOptions(parsing: argument, implied: "type")
            if options["type"]?.hasPrefix("vhost-") == true { throw refusal("it depends on this host") }
            for key in ["fd", "fds", "vhostfd", "vhostfds", "sock"] where options.has(key) {
                throw refusal("it passes a descriptor")
            }
            for key in ["script", "downscript", "helper"] where options[key].map({ $0 != "no" }) ?? false {
                throw refusal("it runs a script of this host")
            }
            return option
        case "device":
            let options = try BlockOptions(parsing: argument, implied: "driver")
            let driver = options["driver"] ?? ""
            if hostDevices.contains(where: driver.hasPrefix) { throw refusal("it depends on this host") }
            if options.has("vhostfd") { throw refusal("it passes a descriptor") }
            var keys = driver == "loader" || driver == "generic-loader" ? ["file"] : []
            if options["romfile"]?.contains("/") == true { keys.append("romfile") }
            return keys.isEmpty ? option : try withPath(.file, keys: keys, implied: "driver")
        default: return option
        }
    }

    // MARK: disks

    /// What `-drive` makes of the short options, where the format has to be said.
    static let driveForms: [String: String] = [
        "hda": "index=0,media=disk", "hdb": "index=1,media=disk", "hdc": "index=2,media=disk",
        "hdd": "index=3,media=disk", "fda": "if=floppy,index=0", "fdb": "if=floppy,index=1", "sd": "if=sd,index=0",
        "mtdblock": "if=mtd", "pflash": "if=pflash",
    ]

    private static func plainDisk(_ option: GuestOption, _ place: Place) throws -> GuestOption {
        let path = option.argument ?? ""
        let placement = try place(PathReference(kind: .disk, path: path, option: "-\(option.name)"))
        guard let format = placement.format, let form = driveForms[option.name] else {
            return GuestOption(option.name, placement.path)
        }
        var options = try BlockOptions(parsing: form)
        options.set("file", .string(placement.path))
        apply(placement, format: format, to: &options)
        return GuestOption("drive", options.text)
    }

    private static func apply(_ placement: Placement, format: String, to options: inout BlockOptions) {
        // What a slice of the old file was does not hold for the new one.
        for name in ["offset", "size"] { options.remove(name) }
        if placement.changesFormat { for name in formatOptions { options.remove(name) } }
        if options["format"] != format {
            options.remove("driver")
            options.set("format", .string(format))
        }
        if placement.isFlattened { options.remove("backing") }
        if let size = placement.size { options.set("size", .string("\(size)")) }
    }

    /// What belongs to one format only.
    static let formatOptions: Set<String> = [
        "l2-cache-size", "l2-cache-entry-size", "refcount-cache-size", "cache-size", "cache-clean-interval",
        "lazy-refcounts",
        "overlap-check", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other", "discard-no-unref",
        "encrypt",
        "key-secret", "backing", "data-file",
    ]

    private static func drive(_ argument: String, _ place: Place) throws -> String {
        var options = try BlockOptions(parsing: argument)
        if options.isOn("snapshot") {
            throw GuestError("A guest with -drive \(argument) cannot be moved: its writes go to a temporary file")
        }
        let isReadOnly = options["media"] == "cdrom" || options.isOn("readonly") || options.isOn("read-only")
        if isReadOnly, options.has("backing") {
            throw GuestError("A guest with -drive \(argument) cannot be moved: a read-only disk with a backing file")
        }
        guard let key = ["file", "file.filename"].first(where: { options[$0] != nil }), let value = options[key],
            !value.isEmpty
        else { return argument }
        if value.hasPrefix("nbd:unix:") || value.hasPrefix("nbd+unix:") || value.hasPrefix("fat:") {
            throw GuestError("A guest with -drive \(argument) cannot be moved: its disk belongs to this host")
        }
        if isNetwork(value) || value.hasPrefix("null-") || value.hasPrefix("json:") { return argument }
        var path = value
        for prefix in ["file:", "host_device:"] where path.hasPrefix(prefix) {
            path = String(path.dropFirst(prefix.count))
        }
        let placement = try place(PathReference(kind: isReadOnly ? .file : .disk, path: path, option: "-drive"))
        if path != value || placement.path != path { options.set(key, .string(placement.path)) }
        if options["file.driver"] == "host_device", !placement.isDevice { options.set("file.driver", "file") }
        if options.has("backing"), !isReadOnly, !placement.isFlattened {
            throw GuestError(
                "A guest with -drive \(argument) cannot be moved: it names its backing file; use -blockdev"
            )
        }
        if let format = placement.format {
            apply(placement, format: format, to: &options)
            return options.text
        }
        for name in ["offset", "size"] where placement.path != path { options.remove(name) }
        return placement.path == value ? argument : options.text
    }

    /// Whether a file name of `-drive` is a disk on the network.
    static func isNetwork(_ value: String) -> Bool {
        [
            "nbd:", "nbds:", "nbd+tcp:", "gluster+tcp:", "iscsi:", "http:", "https:", "ftp:", "ftps:", "rbd:", "ssh:",
            "gluster:", "nfs:",
        ]
        .contains { value.hasPrefix($0) }
    }

    // MARK: character devices and displays

    /// `file:PATH`, `unix:PATH,...`, `pipe:PATH`; other forms have no path.
    private static func characterDevice(_ argument: String, _ rewrite: (String) throws -> String) throws -> String {
        let prefix = argument.hasPrefix("mon:") ? "mon:" : ""
        let rest = argument.dropFirst(prefix.count)
        for scheme in ["file:", "unix:", "pipe:"] where rest.hasPrefix(scheme) {
            let body = rest.dropFirst(scheme.count)
            let comma = scheme == "unix:" ? body.firstIndex(of: ",") ?? body.endIndex : body.endIndex
            return "\(prefix)\(scheme)\(try rewrite(String(body[..<comma])))\(body[comma...])"
        }
        if rest.hasPrefix("/dev/") {
            throw GuestError(
                "A guest with \(argument) as a character device cannot be moved: it is a port of this host"
            )
        }
        return argument
    }

    /// The number of a VNC display may be taken on the other host: the next free one will do.
    private static func display(_ argument: String, _ rewrite: (String) throws -> String) throws -> String {
        if argument.hasPrefix("unix:") { return try characterDevice(argument, rewrite) }
        let parts = KeyValue.split(argument)
        guard let first = parts.first, first.contains(":"), !parts.contains(where: { $0.hasPrefix("to=") }),
            !parts.contains("reverse"), !parts.contains("reverse=on")
        else { return argument }
        return "\(argument),to=99"
    }
}
