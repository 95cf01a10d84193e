internal import IO

/// Objects, and the devices of the guest.
extension OptionRule {
    static let objects: [OptionRule] =
        [
            OptionRule(
                "object",
                argument: .object("qom-type"),
                blank: .emptied(emptyObject),
                check: checkObject,
                relocate: placeObject,
                hostFiles: filesOfObject
            ),
            OptionRule(
                "device",
                argument: .object("driver"),
                blank: .emptied(emptyPart),
                check: checkPart,
                relocate: placePart
            ),
            OptionRule("global", check: checkGlobal),
            OptionRule("set", check: checkSetting),
            OptionRule("usbdevice") { option in
                guard ["tablet", "mouse", "keyboard", "wacom-tablet", "ccid"].contains(option.argument) else {
                    throw option.refusal("it depends on this host; write it as a -device")
                }
            },
            OptionRule("usb", argument: .none),
            OptionRule("tpmdev", owner: .nobody("the TPM's state is kept outside of QEMU"), blank: .leftOut),
        ] + each("watchdog watchdog-action", argument: .text, check: checkWord)

    private static let types: Set<String> = [
        "iothread", "main-loop", "thread-context", "memory-backend-ram", "memory-backend-memfd", "memory-backend-file",
        "secret", "tls-creds-x509", "tls-creds-psk", "tls-creds-anon", "tls-cipher-suites", "authz-simple",
        "authz-list", "rng-random", "rng-builtin", "throttle-group", "cryptodev-backend-builtin", "can-bus",
        "filter-buffer", "filter-dump", "filter-replay", "filter-rewriter",
    ]
    /// Objects that are part of this host.
    private static let hostTypes: Set<String> = [
        "input-linux", "memory-backend-epc", "x-remote-object", "x-vfio-user-server",
    ]
    /// Devices that are part of this host.
    private static let hostDevices = [
        "vfio-", "x-vfio", "vhost-", "usb-host", "usb-mtp", "pci-assign", "ivshmem-doorbell", "virtio-input-host",
        "ccid-card-", "guest-loader", "u2f-", "ipmi-bmc-extern", "tpm-", "xen-", "pvrdma", "virtio-9p", "x-pci-proxy",
    ]
    private static let loaders: Set<String> = ["loader", "generic-loader"]
    /// Properties that are texts for the guest, which may look like paths.
    private static let texts: Set<String> = [
        "serial", "wwn", "name", "product", "vendor", "ver", "label", "model", "loadparm",
    ]
    private static let randomDevices: Set<String> = ["/dev/random", "/dev/urandom", "/dev/hwrng"]

    /// Whether a value is a path of the host: one within QEMU's tree of objects is none.
    private static func isPath(_ value: String) -> Bool {
        if value.split(separator: "/").contains("..") || value == ".." { return true }
        return value.contains("/") && !value.hasPrefix("/machine/") && !value.hasPrefix("/objects/")
    }

    // MARK: objects

    @Sendable private static func checkObject(_ option: ParsedOption) throws {
        let settings = option.settings
        let type = settings["qom-type"] ?? ""
        guard types.contains(type) else { throw option.refusal("it is a part of this host") }
        guard settings["id"] != nil else { throw option.refusal("it has no id") }
        if type == "rng-random", let file = settings["filename"], !randomDevices.contains(file) {
            throw option.refusal("its file is not a source of random numbers that every host has")
        }
        if type == "memory-backend-file", HugePages.root(of: settings["mem-path"] ?? "") == nil {
            throw option.refusal("its file is of this host, and only directories of huge pages are the same elsewhere")
        }
        let placed = placedKey(of: type)
        for leaf in settings.leaves where leaf.key != placed && !(type == "authz-simple" || type == "authz-list") {
            if isPath(leaf.value), !(type == "rng-random" && leaf.key == "filename") {
                throw option.refusal("'\(leaf.key)' is a path of this host")
            }
        }
    }

    /// The property of a type that is a path and is placed.
    private static func placedKey(of type: String) -> String? {
        switch type {
        case "filter-dump": "file"
        case "memory-backend-file": "mem-path"
        case "tls-creds-x509", "tls-creds-psk", "tls-creds-anon": "dir"
        default: nil
        }
    }

    @Sendable private static func placeObject(_ option: inout ParsedOption) throws -> Relocation {
        let settings = option.settings
        let type = settings["qom-type"] ?? ""
        if option.isAtHome, type.hasPrefix("secret") { return .written }
        if type == "secret" || type == "secret_keyring" { throw option.refusal("it holds a secret of this host") }
        if hostTypes.contains(type) { throw option.refusal("it is a part of this host") }
        if type == "memory-backend-file" {
            if settings.isOn("pmem") || settings.isOn("readonly") || settings["readonly"] == "auto" && !option.isAtHome
            {
                throw option.refusal("what its file holds would stay behind")
            }
            if !option.isAtHome { option.set("mem-path", HugePages.root(of: settings["mem-path"] ?? "") ?? "") }
        }
        if type == "filter-dump" { try option.place(.output, keys: "file") }
        if type.hasPrefix("tls-creds-") { try option.place(.directory, keys: "dir") }
        return .written
    }

    @Sendable private static func filesOfObject(_ option: ParsedOption) -> [Confinement.Rule] {
        let settings = option.settings
        let source = settings["qom-type"] == "rng-random" ? settings["filename"] ?? "/dev/urandom" : nil
        return [(settings["mem-path"], .directory), (source, .read), (settings["dir"], .reading)].compactMap {
            (path: String?, rights: Confinement.Rights) in
            path.map { Confinement.Rule($0, rights, isOptional: true) }
        }
    }

    @Sendable private static func emptyObject(_ copy: inout BlankCopy, _ option: ParsedOption) {
        let settings = option.settings
        let type = settings["qom-type"] ?? ""
        if type.hasPrefix("memory-backend-") {
            copy.hasMemory = true
            copy.addMemory(settings["id"] ?? "", settings["size"] ?? "0")
        } else if ["iothread", "throttle-group", "rng-", "can-", "cryptodev-backend-builtin"].contains(
            where: type.hasPrefix
        ) {
            copy.options.append(option.written)
        }
    }

    // MARK: devices

    @Sendable private static func checkPart(_ option: ParsedOption) throws {
        let driver = option.settings["driver"] ?? ""
        for key in ["fd", "fds", "vhostfd", "vhostfds"] where option.settings.has(key) {
            throw option.refusal("it passes a descriptor")
        }
        for leaf in option.settings.leaves where !texts.contains(leaf.key) {
            let isPlaced = leaf.key == "romfile" || leaf.key == "file" && loaders.contains(driver)
            if !isPlaced, isPath(leaf.value) { throw option.refusal("'\(leaf.key)' is a path of this host") }
        }
        if let file = option.settings["romfile"], !file.contains("/"), file == ".." {
            throw option.refusal("'romfile' is a path of this host")
        }
    }

    @Sendable private static func placePart(_ option: inout ParsedOption) throws -> Relocation {
        let driver = option.settings["driver"] ?? ""
        if hostDevices.contains(where: driver.hasPrefix) { throw option.refusal("it depends on this host") }
        if option.settings.has("vhostfd") { throw option.refusal("it passes a descriptor") }
        if loaders.contains(driver) { try option.place(.file, keys: "file") }
        if option.settings["romfile"]?.contains("/") == true { try option.place(.file, keys: "romfile") }
        return .written
    }

    @Sendable private static func emptyPart(_ copy: inout BlankCopy, _ option: ParsedOption) throws {
        var option = option
        if loaders.contains(option.settings["driver"] ?? "") { return }
        if let rom = option.settings["romfile"], rom.contains("/") {
            option.set("romfile", try copy.scratch(copy.size(rom)))
        }
        copy.options.append(option.written)
    }

    // MARK: properties of devices

    /// QEMU splits `DRIVER.PROPERTY=VALUE` itself, and undoes no doubled commas.
    @Sendable private static func checkGlobal(_ option: ParsedOption) throws {
        let parts = option.argument.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
        let name = parts[0].split(separator: ".", maxSplits: 1, omittingEmptySubsequences: false)
        guard parts.count == 2, name.count == 2, name.allSatisfy({ PeerText.isKey(String($0)) }) else {
            throw option.refusal("it is not DRIVER.PROPERTY=VALUE")
        }
        guard !isPath(String(parts[1])), !isFile(name[1]) else {
            throw option.refusal("a path that it sets is not placed on the other host")
        }
    }

    @Sendable private static func checkSetting(_ option: ParsedOption) throws {
        let parts = option.argument.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
        let name = parts[0].split(separator: ".", omittingEmptySubsequences: false)
        guard parts.count == 2, name.count == 3, name[0] == "device", name[2] != "driver", !isFile(name[2]),
            name.allSatisfy({ PeerText.isKey(String($0)) }), !isPath(String(parts[1]))
        else {
            throw option.refusal(
                "only plain properties of devices can be set this way; write them into the option itself"
            )
        }
    }

    private static func isFile(_ property: Substring) -> Bool {
        ["romfile", "file", "filename", "fd", "fds", "vhostfd", "vhostfds", "drive", "evdev", "sysfsdev", "id"]
            .contains(
                property
            )
    }
}
