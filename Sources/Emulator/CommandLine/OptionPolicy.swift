internal import TLS

/// What a command line may ask of a host that did not write it.
///
/// The offer of a migration comes from another host. It describes a machine; it must not make this host run programs, load
/// libraries, or read and write files that were not placed for the guest. What is not known to be harmless is refused by name.
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
        "full-screen", "no-quit", "show-cursor", "sdl", "curses", "L", "d", "dfilter", "seed", "tb-size", "run-with",
        "runas",
        "async-teardown", "mon", "echr", "s", "old-param", "global", "set", "compat", "enable-fips", "add-fd",
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
        "filter-mirror",
        "filter-redirector", "filter-replay", "filter-rewriter", "colo-compare", "confidential-guest-support",
    ]
    private static let networks: Set<String> = [
        "user", "tap", "bridge", "socket", "stream", "dgram", "hubport", "none", "nic", "l2tpv3",
    ]
    private static let characterDevices: Set<String> = [
        "null", "socket", "udp", "msmouse", "wctablet", "vc", "ringbuf", "file", "pipe", "pty", "stdio", "spicevmc",
        "spiceport",
        "testdev",
    ]
    private static let characterForms = [
        "none", "null", "stdio", "vc", "pty", "chardev:", "tcp:", "telnet:", "websocket:", "udp:", "unix:", "file:",
        "pipe:",
        "msmouse", "braille", "con:",
    ]
    /// What a disk may consist of.
    static let blockDrivers: Set<String> = [
        "raw", "qcow2", "qed", "luks", "file", "host_device", "host_cdrom", "throttle", "copy-on-read", "preallocate",
        "nbd", "http",
        "https", "ftp", "ftps", "iscsi", "rbd", "ssh", "nfs", "gluster", "null-co", "null-aio", "vdi", "vmdk", "vpc",
        "vhdx",
    ]

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
            for key in ["kernel", "initrd", "dtb", "dumpdtb", "firmware"]
            where BlockOptions.value(of: key, in: argument) != nil {
                throw refusal(option, "'\(key)' names a file; give it as an option of its own")
            }
        case "icount":
            if argument.contains("rrfile") { throw refusal(option, "it records or replays the guest in a file") }
        case "global":
            if argument.contains("/") { throw refusal(option, "a path that it sets is not placed on the other host") }
        case "set":
            let key = argument.prefix { $0 != "=" }
            guard key.hasPrefix("device."), !key.hasSuffix(".romfile"), !argument.contains("/") else {
                throw refusal(
                    option,
                    "only plain properties of devices can be set this way; write them into the option itself"
                )
            }
        case "audiodev":
            if argument.contains("/") || argument.hasPrefix("wav") || argument.contains("driver=wav") {
                throw refusal(option, "its sound goes to a file or a device of this host")
            }
        case "serial", "monitor", "qmp", "qmp-pretty", "parallel", "debugcon", "gdb":
            let form = argument.hasPrefix("mon:") ? argument.dropFirst(4) : argument[...]
            guard characterForms.contains(where: form.hasPrefix) || Int(form) != nil else {
                throw refusal(option, "it is a port of this host")
            }
        case "chardev": try checkCharacterDevice(option)
        case "object": try checkObject(option)
        case "netdev", "nic", "net": try checkNetwork(option)
        case "device": try checkDevice(option)
        case "drive": try checkDrive(option)
        default: return
        }
    }

    private static func checkCharacterDevice(_ option: GuestOption) throws {
        let options = try BlockOptions(parsing: option.argument ?? "", implied: "backend")
        guard characterDevices.contains(options["backend"] ?? "") else {
            throw refusal(option, "it is a port of this host")
        }
        for key in ["fd", "input-path", "in"] where options.has(key) {
            throw refusal(option, "'\(key)' belongs to this host")
        }
        if options["backend"] == "socket", options["path"] != nil, !options.isOn("server"), !options.isOn("abstract") {
            throw refusal(option, "it connects to a socket that another program of this host has opened")
        }
    }

    private static func checkObject(_ option: GuestOption) throws {
        let options = try BlockOptions(parsing: option.argument ?? "", implied: "qom-type")
        let type = options["qom-type"] ?? ""
        guard objects.contains(type) else { throw refusal(option, "it is a part of this host") }
        if type == "rng-random", let file = options["filename"],
            !["/dev/random", "/dev/urandom", "/dev/hwrng"].contains(file)
        {
            throw refusal(option, "its file is not a source of random numbers that every host has")
        }
        if type == "memory-backend-file", let path = options["mem-path"], !path.hasPrefix("/dev/hugepages") {
            throw refusal(
                option,
                "its file is of this host, and only directories under /dev/hugepages are the same elsewhere"
            )
        }
    }

    private static func checkNetwork(_ option: GuestOption) throws {
        let options = try BlockOptions(parsing: option.argument ?? "", implied: "type")
        guard networks.contains(options["type"] ?? "") else { throw refusal(option, "it depends on this host") }
        for key in ["smb", "tftp", "bootfile"] where options.has(key) {
            throw refusal(option, "'\(key)' shows files of this host")
        }
        let text = option.argument ?? ""
        if text.contains("guestfwd"), text.contains("cmd:") { throw refusal(option, "it runs a program of this host") }
        if ["unix", "fd"].contains(options["addr.type"] ?? "") || options.has("path") {
            throw refusal(option, "it connects to a socket of this host")
        }
    }

    private static func checkDevice(_ option: GuestOption) throws {
        let options = try BlockOptions(parsing: option.argument ?? "", implied: "driver")
        for name in options.names(under: "") where !["romfile", "file", "filename"].contains(name) {
            // An absolute path, or one that climbs.
            if let value = options[name],
                value.hasPrefix("/") && !value.hasPrefix("/machine") && !value.hasPrefix("/objects")
            {
                throw refusal(option, "'\(name)' is a path of this host")
            }
        }
    }

    private static func checkDrive(_ option: GuestOption) throws {
        let options = try BlockOptions(parsing: option.argument ?? "")
        for key in ["driver", "format", "file.driver", "file.file.driver", "backing.driver", "backing.file.driver"] {
            if let driver = options[key], !blockDrivers.contains(driver) {
                throw refusal(option, "a disk of the kind '\(driver)' cannot be placed on another host")
            }
        }
        for key in ["file.file.filename", "file.path", "file.dir"] where options[key] != nil {
            // The path of ssh and nfs is on their server.
            if key == "file.path", ["ssh", "nfs", "gluster"].contains(options["file.driver"] ?? "") { continue }
            throw refusal(option, "'\(key)' is a path of this host; use -blockdev")
        }
        guard let file = options["file"] ?? options["file.filename"] else { return }
        if file.hasPrefix("json:") { throw refusal(option, "its disk is written as JSON; use -blockdev") }
        // A word and a colon in front mean something else than a file.
        if let colon = file.firstIndex(of: ":"), !file[..<colon].contains("/"),
            !["file", "host_device", "null-co", "null-aio"].contains(file[..<colon]), !GuestCommandLine.isNetwork(file)
        {
            throw refusal(option, "its disk belongs to this host")
        }
    }
}
