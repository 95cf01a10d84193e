internal import IO

/// A disk as `-drive` defines it.
enum DriveDefinition {
    /// What belongs to one format only.
    static let formatOptions: Set<String> = [
        "l2-cache-size", "l2-cache-entry-size", "refcount-cache-size", "cache-size", "cache-clean-interval",
        "lazy-refcounts", "overlap-check", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other",
        "discard-no-unref", "encrypt", "key-secret", "backing", "data-file",
    ]

    /// Whether a file name is a disk on the network.
    static func isNetwork(_ value: String) -> Bool {
        [
            "nbd:", "nbds:", "nbd+tcp:", "gluster+tcp:", "iscsi:", "http:", "https:", "ftp:", "ftps:", "rbd:", "ssh:",
            "gluster:", "nfs:",
        ]
        .contains { value.hasPrefix($0) }
    }

    /// The path in a file name, without the name of a protocol.
    static func path(in value: String) -> String {
        for prefix in ["file:", "host_device:"] where value.hasPrefix(prefix) {
            return String(value.dropFirst(prefix.count))
        }
        return value
    }

    private static func isReadOnly(_ settings: BlockOptions) -> Bool {
        settings["media"] == "cdrom" || settings.isOn("readonly") || settings.isOn("read-only")
    }

    /// The format that it says.
    private static func format(_ settings: BlockOptions) -> String? { settings["format"] ?? settings["driver"] }

    static func apply(_ placement: GuestCommandLine.Placement, format: String, to options: inout BlockOptions) {
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

    // MARK: who may have it

    /// Keys of disks that are files of the host that opens them.
    static func reason(against leaf: (key: String, value: String)) -> String? {
        let name = leaf.key.split(separator: ".").last.map(String.init) ?? leaf.key
        if ["conf", "logfile", "log_file", "keyring", "admin_socket"].contains(name) {
            return "'\(leaf.key)' is a file of this host"
        }
        if name == "type", ["unix", "fd", "vsock"].contains(leaf.value) {
            return "its disk is behind a socket of this host"
        }
        return nil
    }

    @Sendable static func check(_ option: ParsedOption) throws {
        let settings = option.settings
        for leaf in settings.leaves { try check(leaf, option) }
        if settings["file"] != nil, settings["file.filename"] != nil {
            throw option.refusal("it names its file twice")
        }
        if settings.has("format"), settings.has("driver") { throw option.refusal("it names its format twice") }
        guard let file = settings["file"] ?? settings["file.filename"] else {
            if settings.has("file") || settings.has("driver") { try checkContents(option, settings["file.driver"]) }
            return
        }
        if isNetwork(file) {
            if let reason = reasonAgainst(address: file) { throw option.refusal(reason) }
            return try checkContents(option, String(file.prefix { $0 != ":" }))
        }
        // A word and a colon in front mean something else than a file.
        if let colon = file.firstIndex(of: ":"), !file[..<colon].contains("/"),
            !["file", "host_device", "null-co", "null-aio"].contains(file[..<colon])
        {
            throw option.refusal("its disk belongs to this host")
        }
        if let driver = settings["file.driver"], !ImageFormat.localProtocols.contains(driver) {
            throw option.refusal("a '\(driver)' has no file name")
        }
        guard isReadOnly(settings), !file.isEmpty, !file.hasPrefix("null-") else { return }
        if settings.has("offset") || settings.has("size") { throw option.refusal("it is a slice of a file") }
        if let format = format(settings), ImageFormat(rawValue: format)?.isCarriedReadOnly != true {
            throw option.refusal("a file of the format '\(format)' may name other files of this host")
        }
    }

    private static func check(_ leaf: (key: String, value: String), _ option: ParsedOption) throws {
        if let reason = reason(against: leaf) { throw option.refusal(reason) }
        let name = leaf.key.split(separator: ".").last.map(String.init) ?? leaf.key
        switch name {
        case "driver", "format":
            let isTop = leaf.key == "driver" || leaf.key == "format"
            let isKnown =
                isTop
                ? ImageFormat(rawValue: leaf.value) != nil || ImageFormat.emptyProtocols.contains(leaf.value)
                : leaf.key == "file.driver" && ImageFormat(rawValue: leaf.value) == nil
                    && ImageFormat.isKnown(driver: leaf.value)
            // The encryption within a format is no node.
            guard isKnown || leaf.key == "encrypt.format" else {
                throw option.refusal("a disk of the kind '\(leaf.value)' in this place is not known; use -blockdev")
            }
        case "filename" where leaf.key != "file.filename":
            throw option.refusal("'\(leaf.key)' is a path of this host; use -blockdev")
        case "node-name" where leaf.key != "node-name", "data-file":
            throw option.refusal("'\(leaf.key)' lets others reach what is under the disk; use -blockdev")
        case "path", "dir":
            guard ["ssh", "nfs", "gluster"].contains(option.settings["file.driver"] ?? "") else {
                throw option.refusal("'\(leaf.key)' is a path of this host; use -blockdev")
            }
        default: break
        }
    }

    /// A disk on the network is what others make of it: in a format that can name files it could become one of this host.
    private static func checkContents(_ option: ParsedOption, _ driver: String?) throws {
        let format = format(option.settings)
        if ImageFormat.emptyProtocols.contains(driver ?? format ?? "") { return }
        guard let format else {
            throw option.refusal("QEMU would guess its format from what is on the network; add format=raw")
        }
        guard ImageFormat(rawValue: format)?.isReadFromNetwork == true else {
            throw option.refusal("a disk on the network in the format '\(format)' may name files of this host")
        }
    }

    /// What an address of a network disk says of this host.
    private static func reasonAgainst(address: String) -> String? {
        let isURL = ["http:", "https:", "ftp:", "ftps:", "iscsi:", "ssh:", "nfs:"].contains(where: address.hasPrefix)
        if !isURL, ["unix", "socket=", "logfile", "%"].contains(where: address.lowercased().contains) {
            return "its address names a socket or a file of this host, or hides what it names"
        }
        guard address.hasPrefix("rbd:") else { return nil }
        for part in colonFields(address).dropFirst(2) {
            let key = part.prefix { $0 != "=" }
            guard ["id", "mon_host", "auth_supported"].contains(key) else {
                return "'\(key)' in its address is not known to be harmless"
            }
        }
        return nil
    }

    /// The fields of an address of Ceph, where a backslash lets a colon stand for itself.
    private static func colonFields(_ text: String) -> [String] {
        var fields = [""]
        var isEscaped = false
        for character in text {
            if isEscaped || character != ":" { fields[fields.count - 1].append(character) } else { fields.append("") }
            isEscaped = character == "\\" && !isEscaped
        }
        return fields
    }

    // MARK: where it is

    @Sendable static func relocate(_ option: inout ParsedOption) throws -> OptionRule.Relocation {
        let settings = option.settings
        if settings.isOn("snapshot") { throw option.refusal("its writes go to a temporary file") }
        let isReadOnly = isReadOnly(settings)
        if isReadOnly, settings.has("backing") { throw option.refusal("a read-only disk with a backing file") }
        guard let key = ["file", "file.filename"].first(where: { settings[$0] != nil }), let value = settings[key],
            !value.isEmpty
        else { return .written }
        if value.hasPrefix("nbd:unix:") || value.hasPrefix("nbd+unix:") || value.hasPrefix("fat:") {
            throw option.refusal("its disk belongs to this host")
        }
        if isNetwork(value) || value.hasPrefix("null-") || value.hasPrefix("json:") { return .written }
        let path = path(in: value)
        let placement = try option.placement(isReadOnly ? .file : .disk, path, format: format(settings))
        if path != value || placement.path != path { option.set(key, placement.path) }
        if settings["file.driver"] == "host_device", !placement.isDevice, placement.path != path {
            option.set("file.driver", "file")
        }
        if settings.has("backing"), !isReadOnly, !placement.isFlattened {
            throw option.refusal("it names its backing file; use -blockdev")
        }
        if isReadOnly, !option.isAtHome {
            // The node under it is opened for reading, whoever is attached to it.
            option.set("file.read-only", "on")
            option.remove("file.auto-read-only")
        }
        if let format = placement.format {
            option.change { apply(placement, format: format, to: &$0) }
        } else if placement.path != path {
            for name in ["offset", "size"] { option.remove(name) }
        }
        return .written
    }

    // MARK: on the network

    /// What a disk on the network connects to.
    @Sendable static func endpoints(_ option: ParsedOption) -> [GuestEndpoint] {
        guard case .settings = option.rule.argument else {
            return isNetwork(option.argument) ? [endpoint(option, address: option.argument)] : []
        }
        let settings = option.settings
        let drivers = settings.prefixes(of: "driver").filter {
            ImageFormat.networkProtocols.contains(settings["\($0)driver"] ?? "")
        }
        let named = drivers.map { prefix in
            for key in ["url", "filename"] {
                if let address = settings["\(prefix)\(key)"] { return endpoint(option, address: address) }
            }
            let port = settings["\(prefix)server.port"] ?? settings["\(prefix)port"]
            let host = settings["\(prefix)server.host"] ?? settings["\(prefix)host"]
            return option.connecting(to: host, port: port.flatMap { Int($0) })
        }
        let addresses = ["file", "file.filename", "filename"].compactMap { settings[$0] }.filter(isNetwork)
        return named + addresses.map { endpoint(option, address: $0) }
    }

    /// `SCHEME://[USER@]HOST[:PORT]/...`, or `nbd:HOST:PORT...`.
    private static func endpoint(_ option: ParsedOption, address: String) -> GuestEndpoint {
        let rest = address.drop { $0 != ":" }.dropFirst()
        let authority = rest.hasPrefix("//") ? rest.dropFirst(2).prefix { $0 != "/" && $0 != "?" } : rest
        let place = authority.lastIndex(of: "@").map { authority[authority.index(after: $0)...] } ?? authority
        if place.hasPrefix("["), let end = place.firstIndex(of: "]") {
            return option.connecting(to: String(place[...end]))
        }
        let parts = place.split(separator: ":", omittingEmptySubsequences: false)
        return option.connecting(
            to: parts.first.map { String($0) },
            port: parts.dropFirst().first.flatMap { Int($0) }
        )
    }
}
