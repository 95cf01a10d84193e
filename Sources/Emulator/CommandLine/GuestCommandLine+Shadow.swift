internal import IO
internal import TLS

extension GuestCommandLine {
    /// What a blank copy of a guest needs to know.
    public struct ShadowMaterial: Sendable {
        /// The bytes of block nodes and drives by name, and of files by path.
        public var sizes: [String: UInt64]
        /// The guest's memory at its start, in bytes.
        public var memory: UInt64
        /// The name of the machine's memory object.
        public var memoryID: String?

        /// Makes a description.
        public init(sizes: [String: UInt64], memory: UInt64, memoryID: String?) {
            self.sizes = sizes
            self.memory = memory
            self.memoryID = memoryID
        }
    }

    private static let shadowless: Set<String> = [
        "kernel", "initrd", "append", "dtb", "shim", "acpitable", "D", "d", "trace", "qmp", "qmp-pretty", "monitor",
        "mon", "pidfile",
        "daemonize", "mem-prealloc", "mem-path", "gdb", "s", "S", "vnc", "display", "nographic", "curses", "sdl",
        "loadvm",
        "incoming", "runas", "overcommit", "realtime", "plugin", "add-fd", "chroot",
    ]

    /// The same machine with nothing in it: no disk, file, socket, network or process of the guest is touched by it.
    ///
    /// Disks and flash are null nodes of the same size, firmware files are empty files of the same size, character devices go
    /// nowhere, networks are isolated, memory is a file that is never written and need not be sent.
    ///
    /// - Parameters:
    ///   - material: sizes and memory.
    ///   - memory: the directory in which QEMU makes the files of the memory.
    ///   - scratch: makes an empty file of so many bytes and returns its path.
    /// - Throws: `GuestError` for what is no command line, and what `scratch` throws.
    public func shadow(
        _ material: ShadowMaterial,
        memory: String,
        scratch: (UInt64) throws -> String
    ) throws -> GuestCommandLine {
        var result: [GuestOption] = []
        var hub = 1
        var hasMemory = false
        var hasSpice = false
        func size(_ names: String?...) -> UInt64 {
            for name in names { if let name, let size = material.sizes[name] { return size } }
            return 1 << 20
        }
        func null(_ size: UInt64, _ form: String) -> GuestOption {
            GuestOption("drive", (form.isEmpty ? "" : "\(form),") + "driver=null-co,size=\(size),read-zeroes=on")
        }
        func memoryFile(_ id: String, _ size: String) -> GuestOption {
            GuestOption(
                "object",
                "memory-backend-file,id=\(KeyValue.escape(id)),size=\(KeyValue.escape(size)),share=on,"
                    + "mem-path=\(KeyValue.escape(memory))"
            )
        }
        for option in try options() {
            let argument = option.argument ?? ""
            switch option.name {
            case let name where Self.shadowless.contains(name): continue
            case "bios", "option-rom": result.append(GuestOption(option.name, try scratch(size(argument))))
            case "hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "mtdblock", "pflash":
                let form = Self.driveForms[option.name] ?? ""
                // A drive without a name gets one of QEMU's from its place.
                result.append(null(size(argument), form))
            case "cdrom": result.append(null(size(argument), "index=2,media=cdrom"))
            case "drive": result.append(try Self.shadowDrive(argument) { size($0, $1) })
            case "blockdev":
                let settings = try BlockOptions(parsing: argument, implied: "driver")
                guard let name = settings["node-name"] else { continue }
                let definition: JSONValue = [
                    "driver": "null-co", "node-name": .string(name), "read-zeroes": true,
                    "size": .integer(Int64(size(name, settings["filename"], settings["file.filename"]))),
                    "read-only": .bool(settings.isOn("read-only")),
                ]
                result.append(GuestOption("blockdev", definition.text))
            case "chardev":
                let settings = try BlockOptions(parsing: argument, implied: "backend")
                guard let id = settings["id"] else { continue }
                result.append(GuestOption("chardev", "null,id=\(id)\(settings.isOn("mux") ? ",mux=on" : "")"))
            case "serial", "parallel", "debugcon":
                let isKept = argument == "none" || argument.hasPrefix("chardev:")
                result.append(GuestOption(option.name, isKept ? argument : "null"))
            case "netdev":
                let settings = try BlockOptions(parsing: argument, implied: "type")
                guard let id = settings["id"] else { continue }
                if settings["type"] == "user" {
                    // It has a state of its own in the stream, which an older library may not take.
                    result.append(GuestOption("netdev", "user,restrict=on,id=\(id)"))
                } else {
                    result.append(GuestOption("netdev", "hubport,id=\(id),hubid=\(hub)"))
                    hub += 1
                }
            case "nic", "net":
                let settings = try BlockOptions(parsing: argument, implied: "type")
                let type = settings["type"] ?? ""
                if type == "none" || type == "nic" {
                    result.append(option)
                } else {
                    let kept = ["model", "mac", "macaddr", "id", "addr"].compactMap { key in
                        settings[key].map { ",\(key)=\(KeyValue.escape($0))" }
                    }
                    result.append(GuestOption(option.name, "user,restrict=on" + kept.joined()))
                }
            case "object":
                let settings = try BlockOptions(parsing: argument, implied: "qom-type")
                let type = settings["qom-type"] ?? ""
                if type.hasPrefix("memory-backend-") {
                    hasMemory = true
                    result.append(memoryFile(settings["id"] ?? "", settings["size"] ?? "0"))
                } else if ["iothread", "throttle-group", "rng-", "can-", "cryptodev-backend-builtin"].contains(
                    where: type.hasPrefix
                ) {
                    result.append(option)
                }
            case "device":
                var settings = try BlockOptions(parsing: argument, implied: "driver")
                let driver = settings["driver"] ?? ""
                if driver == "loader" || driver == "generic-loader" { continue }
                guard let rom = settings["romfile"], rom.contains("/") else {
                    result.append(option)
                    continue
                }
                settings.set("romfile", .string(try scratch(size(rom))))
                result.append(GuestOption("device", settings.text))
            case "spice":
                hasSpice = true
            case "audiodev":
                if let id = option.value("id") { result.append(GuestOption("audiodev", "none,id=\(id)")) }
            case "fw_cfg", "smbios":
                if option.value("file") == nil, option.value("path") == nil { result.append(option) }
            case "boot":
                if option.value("splash") == nil { result.append(option) }
            default: result.append(option)
            }
        }
        if hasSpice {
            // Its devices do not exist without it.
            let socket = try scratch(0)
            result.append(GuestOption("spice", "unix=on,disable-ticketing=on,addr=\(socket).spice"))
        }
        if !hasMemory, let id = material.memoryID, material.memory > 0 {
            result.append(memoryFile(id, "\(material.memory)"))
            // Merged with the machine's other properties.
            result.append(GuestOption("machine", "memory-backend=\(id)"))
        }
        result.append(GuestOption("display", "none"))
        return GuestCommandLine(program: program, options: result, directory: directory)
    }

    private static func shadowDrive(_ argument: String, _ size: (String?, String?) -> UInt64) throws -> GuestOption {
        let settings = try BlockOptions(parsing: argument)
        let file = settings["file"] ?? settings["file.filename"]
        if file == "" || (file == nil && !settings.has("driver") && !settings.has("file")) {
            return GuestOption("drive", argument)
        }
        let kept = [
            "if", "index", "bus", "unit", "media", "id", "readonly", "read-only", "werror", "rerror", "serial",
            "node-name",
        ].compactMap { key in settings[key].map { "\(key)=\(KeyValue.escape($0))" } }
        let bytes = size(file, settings["id"])
        return GuestOption(
            "drive",
            (kept + ["driver=null-co", "size=\(bytes)", "read-zeroes=on"]).joined(separator: ",")
        )
    }
}
