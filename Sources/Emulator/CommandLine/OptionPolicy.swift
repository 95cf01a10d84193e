internal import IO

/// What a command line may ask of a host that did not write it.
///
/// The offer of a migration comes from another host. It describes a machine; it must not make this host run programs, load
/// libraries, or read and write files that were not placed for the guest. What is not known to be harmless is refused by name.
/// Arguments are judged after they were parsed, and a key that is given twice is refused: QEMU and this code might each take
/// another one.
enum OptionPolicy {
    /// Options that are passed on as they are.
    private static let harmless: Set<String> = [
        "machine", "M", "cpu", "m", "smp", "accel", "enable-kvm", "numa", "append", "name", "uuid", "vga", "nodefaults",
        "no-user-config", "no-reboot", "no-shutdown", "no-acpi", "no-hpet", "no-fd-bootchk", "rtc", "usb", "usbdevice",
        "action",
        "watchdog-action", "watchdog", "display", "k", "g", "nographic", "icount", "overcommit", "sandbox", "msg",
        "mem-prealloc",
        "mem-path", "only-migratable", "singlestep", "win2k-hack", "alt-grab", "ctrl-grab", "portrait", "rotate",
        "prom-env",
        "full-screen", "no-quit", "show-cursor", "sdl", "curses", "seed", "tb-size", "run-with", "runas", "iscsi", "id",
        "async-teardown", "mon", "echr", "old-param", "global", "set", "compat", "enable-fips",
    ]
    /// Options whose arguments are looked at where they are rewritten.
    private static let rewritten: Set<String> = [
        "daemonize", "pidfile", "S", "kernel", "initrd", "dtb", "bios", "option-rom", "cdrom", "shim", "hda", "hdb",
        "hdc", "hdd",
        "fda", "fdb", "sd", "mtdblock", "pflash", "drive", "blockdev", "D", "trace", "fw_cfg", "smbios", "acpitable",
        "boot",
        "serial", "monitor", "qmp", "qmp-pretty", "parallel", "debugcon", "gdb", "chardev", "vnc", "spice", "object",
        "netdev",
        "nic", "net", "device", "audiodev",
    ]
    private static let objects: Set<String> = [
        "iothread", "main-loop", "thread-context", "memory-backend-ram", "memory-backend-memfd", "memory-backend-file",
        "secret",
        "tls-creds-x509", "tls-creds-psk", "tls-creds-anon", "tls-cipher-suites", "authz-simple", "authz-list",
        "rng-random",
        "rng-builtin", "throttle-group", "cryptodev-backend-builtin", "can-bus", "filter-buffer", "filter-dump",
        "filter-replay",
        "filter-rewriter",
    ]
    private static let networks: Set<String> = [
        "user", "tap", "bridge", "socket", "stream", "dgram", "hubport", "none", "nic", "l2tpv3",
    ]
    private static let characterDevices: Set<String> = [
        "null", "socket", "udp", "msmouse", "wctablet", "vc", "ringbuf", "file", "pipe", "pty", "stdio", "spicevmc",
        "spiceport",
        "qemu-vdagent", "testdev",
    ]
    /// What a disk may consist of.
    static let blockDrivers: Set<String> = [
        "raw", "qcow2", "qed", "luks", "file", "host_device", "host_cdrom", "throttle", "copy-on-read", "preallocate",
        "nbd", "http",
        "https", "ftp", "ftps", "iscsi", "rbd", "ssh", "nfs", "gluster", "null-co", "null-aio", "vdi", "vmdk", "vpc",
        "vhdx",
    ]
    private static let formats: Set<String> = [
        "raw", "qcow2", "qed", "luks", "vdi", "vmdk", "vpc", "vhdx", "null-co", "null-aio",
    ]
    /// Keys that may be given several times, with a meaning for each.
    private static let repeatable: Set<String> = ["hostfwd", "dnssearch", "value", "dns"]

    private static func refusal(_ option: GuestOption, _ reason: String) -> GuestError {
        GuestError("A guest with -\(option.name) \(option.argument ?? "") cannot be moved: \(reason)")
    }

    /// Checks an option.
    ///
    /// - Throws: `GuestError` naming it.
    static func check(_ option: GuestOption) throws {
        guard harmless.contains(option.name) || rewritten.contains(option.name) else {
            throw GuestError("A guest with -\(option.name) cannot be moved: what it does to another host is not known")
        }
        let argument = option.argument ?? ""
        switch option.name {
        case "machine", "M":
            let settings = try parse(option, "type")
            for key in ["kernel", "initrd", "dtb", "dumpdtb", "firmware"] where settings.has(key) {
                throw refusal(option, "'\(key)' names a file; give it as an option of its own")
            }
        case "icount":
            if try parse(option, "shift").has("rrfile") {
                throw refusal(option, "it records or replays the guest in a file")
            }
        case "iscsi":
            if try parse(option, nil).has("password") {
                throw refusal(option, "it has a password in clear; use password-secret")
            }
        case "mem-path":
            guard isHugePages(argument) else {
                throw refusal(option, "only directories of huge pages are the same elsewhere")
            }
        case "display":
            guard (GuestCommandLine.windows + ["none"]).contains(String(argument.prefix { $0 != "," })) else {
                throw refusal(option, "it opens something on this host that is no window")
            }
        case "global":
            if argument.contains("/") || argument.contains("..") {
                throw refusal(option, "a path that it sets is not placed on the other host")
            }
        case "set":
            let parts = argument.prefix { $0 != "=" }.split(separator: ".")
            guard parts.count == 3, parts[0] == "device",
                !["driver", "romfile", "file", "filename"].contains(parts[2]),
                !argument.contains("/"), !argument.contains("..")
            else {
                throw refusal(
                    option,
                    "only plain properties of devices can be set this way; write them into the option itself"
                )
            }
        case "audiodev":
            let settings = try parse(option, "driver")
            guard settings["driver"] != "wav",
                !settings.leaves.contains(where: { $0.value.contains("/") || $0.key == "path" })
            else {
                throw refusal(option, "its sound goes to a file or a device of this host")
            }
        case "smbios", "fw_cfg", "acpitable": _ = try parse(option, option.name == "fw_cfg" ? "name" : nil)
        case "serial", "parallel", "debugcon": try checkLegacyDevice(option, isMonitor: false)
        // The debugger's stub takes a monitor's commands.
        case "monitor", "qmp", "qmp-pretty", "gdb": try checkLegacyDevice(option, isMonitor: true)
        case "chardev": try checkCharacterDevice(option)
        case "vnc": try checkDisplay(option)
        case "spice": _ = try parse(option, nil)
        case "object": try checkObject(option)
        case "netdev", "nic", "net": try checkNetwork(option)
        case "device": try checkDevice(option)
        case "drive": try checkDrive(option)
        default: return
        }
    }

    /// The argument, with no key twice.
    private static func parse(_ option: GuestOption, _ implied: String?) throws -> BlockOptions {
        let settings = try BlockOptions(parsing: option.argument ?? "", implied: implied)
        var seen: Set<String> = []
        for leaf in settings.leaves where !seen.insert(leaf.key).inserted && !repeatable.contains(leaf.key) {
            throw refusal(option, "'\(leaf.key)' is given twice")
        }
        return settings
    }

    /// Whether a path is a directory of huge pages wherever there are some.
    static func isHugePages(_ path: String) -> Bool {
        guard !path.contains("..") else { return false }
        return ["/dev/hugepages", "/run/hugepages", "/mnt/huge", "/hugepages"].contains { path.hasPrefix($0) }
    }

    // MARK: character devices and displays

    /// Whether a monitor on a character device stays within the guest's own directory.
    static func isPrivate(monitor device: GuestOption) -> Bool {
        guard let settings = try? BlockOptions(parsing: device.argument ?? "", implied: "backend") else { return false }
        switch settings["backend"] {
        case "null", "vc", "ringbuf": return true
        case "socket":
            return settings["path"] != nil && settings.isOn("server") && !settings.has("fd")
                && !settings.isOn("abstract")
        default: return false
        }
    }

    /// What may follow the address of a `-serial` and its like.
    private static let legacyKeys: Set<String> = [
        "server", "wait", "nodelay", "telnet", "websocket", "tn3270", "reconnect", "reconnect-ms", "to", "ipv4", "ipv6",
        "mux",
    ]

    private static func checkLegacyDevice(_ option: GuestOption, isMonitor: Bool) throws {
        let argument = option.argument ?? ""
        let hasMonitor = isMonitor || argument.hasPrefix("mon:")
        let form = argument.hasPrefix("mon:") ? String(argument.dropFirst(4)) : argument
        if ["none", "null", "vc", "pty", "stdio", "msmouse"].contains(form) || form.hasPrefix("vc:") { return }
        // A monitor on a character device that others reach is left out before.
        if form.hasPrefix("chardev:"), !hasMonitor || isMonitor { return }
        // The whole rest is the path.
        if form.hasPrefix("file:") || form.hasPrefix("pipe:") { if !hasMonitor { return } }
        let schemes = hasMonitor ? ["unix:"] : ["unix:", "tcp:", "telnet:", "websocket:", "udp:"]
        guard schemes.contains(where: form.hasPrefix) else {
            throw refusal(
                option,
                hasMonitor
                    ? "a monitor must not be open to others on the other host; give it a Unix socket"
                    : "it is a port of this host"
            )
        }
        var seen: Set<String> = []
        var isServer = false
        for part in KeyValue.split(form).dropFirst() {
            let key = part.prefix { $0 != "=" }
            let name = key.hasPrefix("no") && key != "nodelay" ? String(key.dropFirst(2)) : String(key)
            guard legacyKeys.contains(name), seen.insert(name).inserted else {
                throw refusal(option, "'\(part)' is not known to be harmless, or is given twice")
            }
            if part == "server" || part == "server=on" { isServer = true }
        }
        if form.hasPrefix("unix:"), !isServer {
            throw refusal(option, "it connects to a socket that another program of this host has opened")
        }
    }

    private static func checkCharacterDevice(_ option: GuestOption) throws {
        let options = try parse(option, "backend")
        guard !(option.argument ?? "").hasPrefix("{"), characterDevices.contains(options["backend"] ?? "") else {
            throw refusal(option, "it is a port of this host")
        }
        for key in ["fd", "input-path", "in", "out"] where options.has(key) {
            throw refusal(option, "'\(key)' belongs to this host")
        }
        if options["backend"] == "socket", options["path"] != nil, !options.isOn("server") {
            throw refusal(option, "it connects to a socket that another program of this host has opened")
        }
    }

    private static func checkDisplay(_ option: GuestOption) throws {
        let parts = KeyValue.split(option.argument ?? "")
        guard let first = parts.first, !first.contains("=") else {
            throw refusal(option, "its address is not its first word")
        }
        for part in parts.dropFirst() where ["vnc", "reverse", "path", "addr"].contains(part.prefix { $0 != "=" }) {
            throw refusal(option, "'\(part)' is not known to be harmless")
        }
    }

    // MARK: objects, networks, devices

    private static func checkObject(_ option: GuestOption) throws {
        let options = try parse(option, "qom-type")
        let type = options["qom-type"] ?? ""
        guard objects.contains(type) else { throw refusal(option, "it is a part of this host") }
        if type == "rng-random", let file = options["filename"],
            !["/dev/random", "/dev/urandom", "/dev/hwrng"].contains(file)
        {
            throw refusal(option, "its file is not a source of random numbers that every host has")
        }
        if type == "memory-backend-file", !isHugePages(options["mem-path"] ?? "") {
            throw refusal(option, "its file is of this host, and only directories of huge pages are the same elsewhere")
        }
    }

    private static func checkNetwork(_ option: GuestOption) throws {
        let options = try parse(option, "type")
        guard networks.contains(options["type"] ?? "") else { throw refusal(option, "it depends on this host") }
        for leaf in options.leaves {
            let name = leaf.key.split(separator: ".").last.map(String.init) ?? leaf.key
            if ["smb", "tftp", "bootfile", "guestfwd"].contains(name) || leaf.key.hasPrefix("guestfwd") {
                throw refusal(option, "'\(name)' shows files or services of this host, or runs its programs")
            }
            if name == "path" || name == "type" && leaf.key != "type" && leaf.value != "inet" {
                throw refusal(option, "it connects to a socket of this host")
            }
        }
    }

    private static let texts: Set<String> = [
        "serial", "wwn", "name", "product", "vendor", "ver", "label", "model", "loadparm",
    ]
    private static let placed: Set<String> = ["romfile", "file", "filename"]

    private static func checkDevice(_ option: GuestOption) throws {
        for leaf in try parse(option, "driver").leaves where !texts.contains(leaf.key) && !placed.contains(leaf.key) {
            let isObject = leaf.value.hasPrefix("/machine/") || leaf.value.hasPrefix("/objects/")
            if leaf.value.contains("..") || leaf.value.contains("/") && !isObject {
                throw refusal(option, "'\(leaf.key)' is a path of this host")
            }
        }
    }

    // MARK: disks

    /// Keys of network disks that are files of the host that opens them.
    static func checkLeaf(_ leaf: (key: String, value: String)) -> String? {
        let name = leaf.key.split(separator: ".").last.map(String.init) ?? leaf.key
        if ["conf", "logfile", "log_file", "keyring"].contains(name) { return "'\(leaf.key)' is a file of this host" }
        if name == "type", ["unix", "fd", "vsock"].contains(leaf.value) {
            return "its disk is behind a socket of this host"
        }
        return nil
    }

    private static func checkDrive(_ option: GuestOption) throws {
        let options = try parse(option, nil)
        guard !(option.argument ?? "").hasPrefix("{") else { throw refusal(option, "JSON is for -blockdev") }
        for leaf in options.leaves {
            if let reason = checkLeaf(leaf) { throw refusal(option, reason) }
            let name = leaf.key.split(separator: ".").last.map(String.init) ?? leaf.key
            switch name {
            case "driver", "format":
                let isTop = leaf.key == "driver" || leaf.key == "format"
                guard
                    isTop
                        ? formats.contains(leaf.value) : leaf.key == "file.driver" && blockDrivers.contains(leaf.value)
                else {
                    throw refusal(
                        option,
                        "a disk of the kind '\(leaf.value)' in this place is not known; use -blockdev"
                    )
                }
            case "filename" where leaf.key != "file.filename":
                throw refusal(option, "'\(leaf.key)' is a path of this host; use -blockdev")
            case "path", "dir":
                guard ["ssh", "nfs"].contains(options["file.driver"] ?? "") else {
                    throw refusal(option, "'\(leaf.key)' is a path of this host; use -blockdev")
                }
            default: break
            }
        }
        if options["file"] != nil, options["file.filename"] != nil { throw refusal(option, "it names its file twice") }
        guard let file = options["file"] ?? options["file.filename"] else { return }
        if GuestCommandLine.isNetwork(file) {
            if ["conf=", "log", "keyring", "unix", "socket="].contains(where: file.contains) {
                throw refusal(option, "its address names a file or a socket of this host")
            }
            return
        }
        // A word and a colon in front mean something else than a file.
        if let colon = file.firstIndex(of: ":"), !file[..<colon].contains("/"),
            !["file", "host_device", "null-co", "null-aio"].contains(file[..<colon])
        {
            throw refusal(option, "its disk belongs to this host")
        }
    }
}
