internal import CLinux
internal import Glibc
internal import IO
public import TLS

/// What a running QEMU is: its description for another host, its disks, and what keeps it from moving.
public struct GuestInspection: Sendable {
    /// The command line with everything that was plugged in since, and with what QEMU derived from this host fixed.
    public internal(set) var commandLine: GuestCommandLine
    /// How it differs from the command line that QEMU was started with, a sentence each.
    public internal(set) var changes: [String] = []
    /// Why the guest cannot be migrated, a sentence each.
    public internal(set) var blockers: [String] = []
    /// The disks that have a medium.
    public internal(set) var disks: [GuestDisk] = []
    /// The disk of each path of the command line.
    public internal(set) var diskOfPath: [String: GuestDisk] = [:]
    /// The id of the secret that opens a disk, by the disk's path in the command line.
    public internal(set) var keySecret: [String: String] = [:]
    /// Where each path of the command line leads on this host, absolute.
    public internal(set) var resolved: [String: String] = [:]
    /// The name of the machine's memory object.
    public internal(set) var memoryID: String?
    /// The bytes of each block node and drive by its name, and of each path.
    public internal(set) var sizes: [String: UInt64] = [:]
    /// The values of the guest's secrets, by id.
    public internal(set) var secrets: [String: SecretBytes] = [:]
    /// The machine type with its version.
    public internal(set) var machine = ""
    /// The processor's model.
    public internal(set) var processor = ""
    /// How many processors it has now.
    public internal(set) var processors = 0
    /// The memory at its start, in bytes.
    public internal(set) var memory: UInt64 = 0
    /// QEMU's version.
    public internal(set) var emulatorVersion = ""
    /// The run state.
    public internal(set) var status = ""

    /// Asks the running QEMU of a guest that is on record.
    ///
    /// - Throws: `QMPError` when QEMU does not answer.
    public static func inspect(_ monitor: QMPClient, _ record: GuestRecord) async throws -> GuestInspection {
        let pid = record.process?.pid ?? 0
        let emulator = try? await BlockingPool.shared.run { try RunningEmulator(pid: pid) }
        // The record of an adopted guest leaves out what must not be on a disk.
        let line =
            record.adopted == nil
            ? nil : emulator.map { GuestCommandLine(arguments: $0.arguments, directory: $0.directory) }
        return try await inspect(monitor, line ?? record.commandLine, emulator)
    }

    /// Asks a running QEMU.
    ///
    /// Nothing of the guest is changed. What cannot be moved is among the `blockers`.
    ///
    /// - Parameters:
    ///   - monitor: its monitor.
    ///   - commandLine: how it was started.
    ///   - emulator: its process, where /proc tells about it.
    /// - Throws: `QMPError` when QEMU does not answer.
    public static func inspect(
        _ monitor: QMPClient,
        _ commandLine: GuestCommandLine,
        _ emulator: RunningEmulator?
    ) async throws -> GuestInspection {
        var inspector = GuestInspector(monitor, commandLine, emulator)
        try await inspector.run()
        return inspector.result
    }
}

/// The work behind a `GuestInspection`.
private struct GuestInspector {
    let monitor: QMPClient
    let emulator: RunningEmulator?
    var options: [GuestOption] = []
    /// Where `/dev/fdset/N` leads.
    var sets: [String: String] = [:]
    var result: GuestInspection

    init(_ monitor: QMPClient, _ commandLine: GuestCommandLine, _ emulator: RunningEmulator?) {
        self.monitor = monitor
        self.emulator = emulator
        result = GuestInspection(commandLine: commandLine)
    }

    private mutating func block(_ reason: String) {
        if !result.blockers.contains(reason) { result.blockers.append(reason) }
    }

    private mutating func note(_ change: String) { result.changes.append(change) }

    private func resolve(_ path: String) -> String {
        if let path = sets[path] { return path }
        return emulator?.resolve(path) ?? DurableFile.resolve(path, in: result.commandLine.directory)
    }

    mutating func run() async throws {
        result.emulatorVersion = monitor.version
        result.status = try await monitor.status()
        result.machine = try await monitor.machineType()
        result.processor = try await monitor.processorModel() ?? ""
        result.processors = try await monitor.execute("query-cpus-fast").array.count
        result.memory = try await monitor.baseMemory()
        for machine in try await monitor.execute("query-machines").array where machine["name"]?.string == result.machine
        {
            result.memoryID = machine["default-ram-id"]?.string
        }
        for reason in try await monitor.migrationBlockers() { block("QEMU: \(reason)") }
        try await readDescriptorSets()
        let graph = try await monitor.blockGraph()
        result.disks = graph.disks.map { disk in
            var disk = disk
            if disk.isLocal { disk.path = resolve(disk.path) }
            for index in disk.backing.indices where disk.backing[index].protocolDriver == "file" {
                disk.backing[index].path = resolve(disk.backing[index].path)
            }
            return disk
        }
        do {
            options = try result.commandLine.options()
            try readConfigurations()
            dropWhatIsOver()
            try await resolveDescriptors()
            try makeMemoryAnonymous()
            try await followHotPlug(graph)
            try followMedia(graph)
            try await freeze()
            try await takeSecrets()
            result.commandLine = GuestCommandLine(
                program: result.commandLine.program,
                options: options,
                directory: result.commandLine.directory
            )
            try matchDisks(graph)
        } catch let error as GuestError {
            block(error.message)
        }
        try await checkBlockState(graph)
        // The same disk is meant by whoever speaks of it.
        for disk in result.disks {
            result.sizes[disk.name] = disk.size
        }
        for node in graph.nodes.values { result.sizes[node.name] = node.size }
    }

    // MARK: the command line as it was given

    private mutating func readConfigurations() throws {
        options = try options.flatMap { option -> [GuestOption] in
            guard option.name == "readconfig" else { return [option] }
            let path = resolve(option.argument ?? "")
            guard let bytes = try? DurableFile.read(path, limit: 1 << 20) else {
                throw GuestError("The file \(path) of -readconfig is not there any more")
            }
            result.changes.append("-readconfig \(path): its options take its place")
            return try GuestOption.expand(config: String(decoding: bytes, as: UTF8.self), path: path)
        }
    }

    /// What was for the start of this process only, and Crossdock's own monitors.
    private mutating func dropWhatIsOver() {
        let own: Set<String> = ["crossdock-qmp", "crossdock-status"]
        options.removeAll { option in
            switch option.name {
            case "incoming", "S", "loadvm": true
            case "chardev": option.value("id").map(own.contains) ?? false
            case "mon": option.value("chardev").map(own.contains) ?? false
            default: false
            }
        }
    }

    /// What is behind `/dev/fdset/N`. QEMU keeps copies of the descriptors under other numbers than it was given.
    private mutating func readDescriptorSets() async throws {
        for set in try await monitor.execute("query-fdsets").array {
            guard let id = set["fdset-id"]?.integer, let fd = set["fds"]?.array.last?["fd"]?.integer,
                let path = emulator?.files[Int32(clamping: fd)], path.hasPrefix("/")
            else { continue }
            sets["/dev/fdset/\(id)"] = path
        }
    }

    /// Descriptors that QEMU inherited become what they are descriptors of.
    private mutating func resolveDescriptors() async throws {
        if options.contains(where: { $0.name == "chardev" && $0.value("fd") != nil }) {
            let devices = try await monitor.execute("query-chardev").array
            for index in options.indices where options[index].name == "chardev" {
                var settings = try BlockOptions(parsing: options[index].argument ?? "", implied: "backend")
                guard settings["fd"] != nil, settings["backend"] == "socket", let id = settings["id"],
                    let socket = devices.first(where: { $0["label"]?.string == id }).flatMap(CharacterSocket.init),
                    socket.isServer
                else { continue }
                settings.remove("fd")
                settings.set("path", .string(socket.path))
                note(
                    "-chardev \(options[index].argument ?? ""): its descriptor is the socket \(settings["path"] ?? "")"
                )
                options[index].argument = settings.text
            }
        }
        if !sets.isEmpty {
            options.removeAll { $0.name == "add-fd" }
            for index in options.indices {
                guard var argument = options[index].argument, argument.contains("/dev/fdset/") else { continue }
                if ["drive", "blockdev"].contains(options[index].name), !argument.contains("locking") {
                    // The copies of a descriptor have locks of their own, and QEMU ends itself when they meet.
                    block(
                        "The disk of -\(options[index].name) \(argument) came as a descriptor, and QEMU aborts when such a disk is "
                            + "copied while it locks it; start the guest with the disk's path, or with locking=off"
                    )
                }
                for (name, path) in sets.sorted(by: { $0.key.count > $1.key.count }) {
                    argument = argument.replacing(name, with: path)
                }
                note(
                    "\(GuestOption.words([options[index]]).joined(separator: " ")): -\(options[index].name) \(argument)"
                )
                options[index].argument = argument
            }
        }
        for index in options.indices where options[index].name == "netdev" {
            var settings = try BlockOptions(parsing: options[index].argument ?? "", implied: "type")
            guard settings["type"] == "tap", let number = settings["fd"].flatMap({ Int32($0) }),
                let interface = emulator?.tapInterface(number)
            else { continue }
            settings.remove("fd")
            settings.remove("vhostfd")
            settings.set("ifname", .string(interface))
            settings.set("script", "no")
            settings.set("downscript", "no")
            note("-netdev \(options[index].argument ?? ""): descriptor \(number) is the interface \(interface)")
            options[index].argument = settings.text
        }
    }

    /// Memory in a file of this host becomes memory without a file; a directory of huge pages stays what it is.
    private mutating func makeMemoryAnonymous() throws {
        for index in options.indices where options[index].name == "object" {
            var settings = try BlockOptions(parsing: options[index].argument ?? "", implied: "qom-type")
            guard settings["qom-type"] == "memory-backend-file", let path = settings["mem-path"],
                !OptionPolicy.isHugePages(resolve(path)), !settings.isOn("pmem"), !settings.isOn("readonly")
            else { continue }
            let keepers = ["nvdimm", "virtio-pmem-pci", "virtio-pmem", "ivshmem-plain"]
            if let id = settings["id"],
                let device = options.first(where: {
                    $0.name == "device" && $0.value("memdev") == id && keepers.contains($0.value("driver") ?? "")
                })
            {
                block(
                    "The device \(device.value("driver") ?? "") keeps what it holds in \(path), which would stay behind"
                )
                continue
            }
            for name in ["mem-path", "align", "pmem", "readonly", "discard-data"] { settings.remove(name) }
            if !settings.has("share") { settings.set("share", "off") }
            settings.set("qom-type", "memory-backend-memfd")
            note("-object memory-backend-file,mem-path=\(path): anonymous memory takes the file's place")
            options[index].argument = settings.text
        }
        for path in options.filter({ $0.name == "mem-path" }).compactMap(\.argument)
        where !OptionPolicy.isHugePages(resolve(path)) {
            note("-mem-path \(path): anonymous memory takes the file's place")
            options.removeAll { $0.name == "mem-path" && $0.argument == path }
        }
    }

    // MARK: what was plugged in and out

    private func ids(_ name: String) -> Set<String> {
        Set(options.filter { $0.name == name }.compactMap { $0.value("id") })
    }

    private mutating func followHotPlug(_ graph: BlockGraph) async throws {
        let devices = try await monitor.members(of: "/machine/peripheral").filter { $0.childType != nil }
        let present = Set(devices.map(\.name))
        options.removeAll { option in
            guard option.name == "device", let id = option.value("id"), !present.contains(id) else { return false }
            result.changes.append("-device \(option.argument ?? ""): unplugged, left out")
            return true
        }
        let drives = Set(graph.drives.map(\.name))
        options.removeAll { option in
            switch option.name {
            case "drive":
                guard let id = option.value("id"), option.value("if") == "none", !drives.contains(id) else {
                    return false
                }
                result.changes.append("-drive \(option.argument ?? ""): removed, left out")
                return true
            case "blockdev":
                guard let name = option.value("node-name"), graph.nodes[name] == nil else { return false }
                result.changes.append("-blockdev \(option.argument ?? ""): removed, left out")
                return true
            default: return false
            }
        }
        try await addObjects()
        try await addCharacterDevices()
        try await addNetworks()
        let known = ids("device")
        // A device is plugged into another one that was there before it.
        let added = devices.filter { !known.contains($0.name) }
        for device in added { try await addDevice(device.name, device.childType ?? "", graph) }
        let anonymous = try await monitor.members(of: "/machine/peripheral-anon").filter { $0.childType != nil }
        for device in anonymous {
            let path = "/machine/peripheral-anon/\(device.name)"
            if try await monitor.property("hotplugged", of: path)?.bool == true {
                block(
                    "The device \(device.childType ?? "") was plugged in without an id; unplug it, and plug it in with one"
                )
            }
        }
    }

    /// A disc that was ejected or changed since is the one that the guest has now.
    private mutating func followMedia(_ graph: BlockGraph) throws {
        func medium(_ drive: BlockGraph.Drive) -> String? {
            drive.node.flatMap { graph.disk(of: $0) }.map { $0.isLocal ? resolve($0.path) : $0.path }
        }
        let present = Set(graph.drives.compactMap(medium))
        var unnamed = graph.drives.filter { drive in
            drive.isRemovable && !options.contains { $0.name == "drive" && $0.value("id") == drive.name }
                && medium(drive).map { path in !options.contains { $0.argument?.contains(path) == true } } ?? true
        }
        for index in options.indices {
            let option = options[index]
            let settings = option.name == "drive" ? try BlockOptions(parsing: option.argument ?? "") : nil
            let given = option.name == "cdrom" ? option.argument : settings?["file"]
            guard option.name == "cdrom" || settings?["media"] == "cdrom" || settings?["if"] == "floppy", let given,
                !given.isEmpty,
                !GuestCommandLine.isNetwork(given), !present.contains(resolve(given))
            else { continue }
            let drive = settings?["id"].flatMap { id in graph.drives.first { $0.name == id } }
            guard let now = drive ?? (unnamed.count == 1 ? unnamed[0] : nil) else {
                throw GuestError(
                    "The disc \(given) of -\(option.name) is not in the guest's drive any more; put it back first"
                )
            }
            unnamed.removeAll { $0.name == now.name }
            var changed = try settings ?? BlockOptions(parsing: "index=2,media=cdrom")
            let disk = now.node.flatMap { graph.disk(of: $0) }
            if let disk, !disk.isLocal {
                throw GuestError(
                    "The disc in the drive of -\(option.name) \(given) was changed for one on the network; eject it first"
                )
            }
            for key in ["file", "format", "driver"] { changed.remove(key) }
            if let disk {
                changed.set("file", .string(resolve(disk.path)))
                changed.set("format", .string(disk.format))
            }
            options[index] = GuestOption("drive", changed.text)
            note("-\(option.name) \(given): the drive \(disk.map { "has \($0.path)" } ?? "is empty") now")
        }
    }

    private static let plainObjects: Set<String> = [
        "iothread", "memory-backend-ram", "memory-backend-memfd", "secret", "rng-random", "rng-builtin",
        "throttle-group",
        "tls-creds-x509", "tls-creds-psk", "tls-creds-anon", "cryptodev-backend-builtin",
    ]

    private mutating func addObjects() async throws {
        let known = ids("object")
        let standard = try await monitor.execute("query-machines").array.compactMap { $0["default-ram-id"]?.string }
        for object in try await monitor.members(of: "/objects") {
            guard let type = object.childType, !known.contains(object.name), !standard.contains(object.name) else {
                continue
            }
            if object.name == MasterKey.id { continue }
            guard Self.plainObjects.contains(type) else {
                block("The object '\(object.name)' of type \(type) was added at run time and cannot be described")
                continue
            }
            let path = "/objects/\(object.name)"
            var parts = ["\(type),id=\(object.name)"]
            let names: [String: [String]] = [
                "memory-backend-ram": ["size", "share"], "memory-backend-memfd": ["size", "share"],
                "rng-random": ["filename"], "iothread": [], "secret": ["format", "file", "data", "keyid", "iv"],
                "tls-creds-x509": ["endpoint", "dir", "verify-peer", "passwordid"],
                "tls-creds-psk": ["endpoint", "dir", "username"], "tls-creds-anon": ["endpoint"],
            ]
            for name in names[type] ?? [] {
                guard let value = try await monitor.property(name, of: path) else { continue }
                switch value {
                case .string(let text) where !text.isEmpty: parts.append("\(name)=\(KeyValue.escape(text))")
                case .bool(let flag): parts.append("\(name)=\(flag ? "on" : "off")")
                case .integer(let number): parts.append("\(name)=\(number)")
                default: break
                }
            }
            let option = GuestOption("object", parts.joined(separator: ","))
            options.append(option)
            note("-object \(parts[0]): added at run time")
        }
    }

    private mutating func addCharacterDevices() async throws {
        let known = ids("chardev")
        let automatic = ["compat_monitor", "serial", "parallel", "gdb", "debugcon", "crossdock-"]
        for device in try await monitor.execute("query-chardev").array {
            guard let label = device["label"]?.string, !known.contains(label),
                !automatic.contains(where: label.hasPrefix), let name = device["filename"]?.string
            else { continue }
            let argument: String
            if let socket = CharacterSocket(device) {
                argument =
                    "socket,id=\(label),path=\(KeyValue.escape(socket.path))"
                    + (socket.isServer ? ",server=on,wait=off" : "")
            } else if name == "null" {
                argument = "null,id=\(label)"
            } else if name.hasPrefix("pty:") || name.hasPrefix("pty") {
                argument = "pty,id=\(label)"
            } else if name == "vc" || name == "spicevmc" || name == "mux" || name.hasPrefix("gdb") {
                continue
            } else if name == "file" {
                block(
                    "The character device '\(label)' was added at run time and writes to a file that QEMU does not tell"
                )
                continue
            } else {
                block("The character device '\(label)' (\(name)) was added at run time and cannot be described")
                continue
            }
            options.append(GuestOption("chardev", argument))
            note("-chardev \(argument): added at run time")
        }
    }

    private mutating func addNetworks() async throws {
        let known = ids("netdev").union(ids("nic")).union(ids("net"))
        let text = try await monitor.execute("human-monitor-command", ["command-line": "info network"]).string ?? ""
        for raw in text.split(whereSeparator: \.isNewline) {
            var line = raw.trimmed
            if line.hasPrefix("\\ ") { line = String(line.dropFirst(2)) }
            guard let colon = line.firstRange(of: ": index="), !line.contains("type=nic") else { continue }
            let id = String(line[..<colon.lowerBound])
            let settings = String(line[line.index(colon.lowerBound, offsetBy: 2)...])
            guard let type = BlockOptions.value(of: "type", in: settings), !known.contains(id),
                // QEMU's own networks, of -net and -nic and by default, have names that nobody can give.
                id.first?.isLetter == true, id.allSatisfy({ $0.isLetter || $0.isNumber || "._-".contains($0) })
            else { continue }
            let argument: String
            if type == "user" {
                argument = "user,id=\(id)"
            } else if type == "tap",
                let interface = BlockOptions.value(of: "ifname", in: settings),
                line.contains("script=no,downscript=no")
            {
                argument = "tap,id=\(id),ifname=\(interface),script=no,downscript=no"
            } else {
                block("The network back end '\(id)' (\(type)) was added at run time and cannot be described")
                continue
            }
            options.append(GuestOption("netdev", argument))
            note("-netdev \(argument): added at run time")
        }
    }

    private mutating func addDevice(_ id: String, _ type: String, _ graph: BlockGraph) async throws {
        let path = "/machine/peripheral/\(id)"
        var settings: [String: JSONValue] = ["driver": .string(type), "id": .string(id)]
        if type.hasSuffix("-cpu") {
            for name in ["socket-id", "die-id", "core-id", "thread-id"] {
                if let value = try await monitor.property(name, of: path)?.integer, value >= 0 {
                    settings[name] = .integer(value)
                }
            }
        } else {
            for (name, kind, standard) in try await monitor.deviceProperties(type) {
                guard !kind.hasPrefix("child<"), let value = try await monitor.property(name, of: path),
                    value != standard
                else { continue }
                if let text = value.string, text.isEmpty { continue }
                // Numbers without a default tell something that the device has worked out, but for one.
                if standard == nil, value.integer != nil, name != "bootindex" || value == .integer(-1) { continue }
                if name == "addr", kind == "int32", let number = value.integer {
                    settings[name] = .string(Self.address(number))
                } else if kind.hasPrefix("link<") {
                    settings[name] = .string(value.string?.split(separator: "/").last.map(String.init) ?? "")
                } else if [.null].contains(value) || !value.object.isEmpty || !value.array.isEmpty {
                    continue
                } else {
                    settings[name] = value
                }
            }
            if let bus = try await monitor.property("parent_bus", of: path)?.string?.split(separator: "/").last {
                settings["bus"] = .string(String(bus))
            }
        }
        if let drive = settings["drive"]?.string { try addDrive(drive, graph) }
        options.append(GuestOption("device", JSONValue.object(settings).text))
        note("-device \(type),id=\(id): plugged in at run time")
    }

    private static func address(_ number: Int64) -> String {
        "\(String(number >> 3, radix: 16)).\(String(number & 7, radix: 16))"
    }

    /// The definition of a disk that was plugged in, from what it is now.
    private mutating func addDrive(_ name: String, _ graph: BlockGraph) throws {
        let isNode = graph.nodes[name] != nil
        if isNode, options.contains(where: { $0.name == "blockdev" && $0.value("node-name") == name }) { return }
        if !isNode, ids("drive").contains(name) { return }
        let outermost = isNode ? name : graph.drives.first { $0.name == name }?.node
        guard let outermost, let disk = graph.disk(of: outermost), let node = graph.nodes[disk.node] else {
            throw GuestError("The disk '\(name)', plugged in at run time, cannot be described")
        }
        guard disk.isLocal else {
            throw GuestError("The disk '\(name)', plugged in at run time, is on the network and cannot be described")
        }
        guard !disk.isEncrypted else {
            throw GuestError("The disk '\(name)', plugged in at run time, is encrypted and cannot be described")
        }
        let cache: JSONValue = ["direct": .bool(node.isDirect), "no-flush": .bool(node.ignoresFlush)]
        var file: [String: JSONValue] = [
            "driver": .string(disk.protocolDriver), "filename": .string(resolve(disk.path)), "cache": cache,
            "discard": "unmap",
        ]
        if disk.protocolNode != name, !disk.protocolNode.hasPrefix("#") {
            file["node-name"] = .string(disk.protocolNode)
        }
        let argument: String
        if isNode {
            let definition: [String: JSONValue] = [
                "driver": .string(disk.format), "node-name": .string(name), "file": .object(file), "cache": cache,
                "discard": "unmap", "read-only": .bool(disk.isReadOnly), "detect-zeroes": .string(node.detectZeroes),
            ]
            argument = JSONValue.object(definition).text
            options.append(GuestOption("blockdev", argument))
        } else {
            argument =
                "if=none,id=\(name),file=\(KeyValue.escape(resolve(disk.path))),format=\(disk.format),discard=unmap"
                + ",cache=\(node.isDirect ? "none" : "writeback")\(disk.isReadOnly ? ",readonly=on" : "")"
            options.append(GuestOption("drive", argument))
        }
        note("\(isNode ? "-blockdev" : "-drive") \(name): plugged in at run time")
    }

    // MARK: what QEMU derived from this host

    private mutating func freeze() async throws {
        let line = GuestCommandLine(program: "qemu", options: options, directory: "/")
        options = try line.pinned(machine: result.machine).options()
        if let smp = try await monitor.property("smp", of: "/machine")?.object, !smp.isEmpty {
            let names = ["cpus", "sockets", "dies", "cores", "threads", "maxcpus"]
            var parts: [String] = []
            for name in names {
                guard let value = smp[name]?.integer else { continue }
                // Not every machine has dies.
                if name == "dies", value == 1 { continue }
                // Processors that were plugged in are devices of their own and not counted here.
                parts.append("\(name)=\(value)")
            }
            replace("smp", with: parts.joined(separator: ","))
        }
        try await freezeProcessor()
        var counts: [String: Int] = [:]
        // QEMU lists them in no order; their numbers are the order of the command line.
        func number(_ member: QMPClient.ObjectMember) -> Int { Int(member.name.filter(\.isNumber)) ?? 0 }
        let anonymous = try await monitor.members(of: "/machine/peripheral-anon").filter { $0.childType != nil }
            .sorted { number($0) < number($1) }
        for index in options.indices where options[index].name == "device" {
            let settings = try BlockOptions(parsing: options[index].argument ?? "", implied: "driver")
            guard let driver = settings["driver"] else { continue }
            let path: String
            if let id = settings["id"] {
                path = "/machine/peripheral/\(id)"
            } else {
                let alike = anonymous.filter { $0.childType == driver }
                let number = counts[driver, default: 0]
                counts[driver] = number + 1
                guard alike.indices.contains(number) else { continue }
                path = "/machine/peripheral-anon/\(alike[number].name)"
            }
            try await freezeDevice(index, settings, path)
        }
    }

    private mutating func replace(_ name: String, with argument: String) {
        let old = options.last { $0.name == name }?.argument
        guard old != argument else { return }
        options.removeAll { $0.name == name }
        options.append(GuestOption(name, argument))
        note("-\(name) \(old ?? "(not given)"): fixed as \(argument)")
    }

    /// What QEMU chooses for a device by the order of devices, the number of processors or the network's properties.
    private mutating func freezeDevice(_ index: Int, _ settings: BlockOptions, _ path: String) async throws {
        var settings = settings
        var fixed: [String] = []
        // Memory modules have an address of another kind.
        let isPCI = try await monitor.deviceProperties(settings["driver"] ?? "").contains {
            $0.name == "addr" && $0.type == "int32"
        }
        for name in ["addr", "mac", "num-queues", "num_queues", "host_mtu", "vectors"] where !settings.has(name) {
            guard let value = try await monitor.property(name, of: path) else { continue }
            let text: String
            switch value {
            case .integer(let number):
                if name == "addr" ? number < 0 : number <= 0 || number >= 65535 { continue }
                // What QEMU chooses by the queues of a network; the others follow from what is given.
                if name == "vectors", settings["driver"]?.hasPrefix("virtio-net") != true { continue }
                text = name == "addr" && isPCI ? Self.address(number) : "\(number)"
            case .string(let string) where !string.isEmpty: text = string
            default: continue
            }
            let isText = name == "addr" && isPCI || name == "mac"
            settings.set(name, isText ? .string(text) : .integer(Int64(text) ?? 0))
            fixed.append("\(name)=\(text)")
        }
        guard !fixed.isEmpty else { return }
        note("-device \(settings["driver"] ?? ""): fixed \(fixed.joined(separator: ","))")
        options[index].argument = settings.text
    }

    /// A model that means "whatever this host has" becomes the list of what it has.
    private mutating func freezeProcessor() async throws {
        guard let path = try await monitor.firstProcessor(), !result.processor.isEmpty else { return }
        let given = options.last { $0.name == "cpu" }?.argument
        guard let given else {
            options.append(GuestOption("cpu", result.processor))
            note("-cpu (not given): fixed as \(result.processor)")
            return
        }
        guard ["host", "max"].contains(KeyValue.split(given).first ?? "") else { return }
        var parts = KeyValue.split(given)
        let named = Set(
            parts.dropFirst().map { part in
                let bare = part.hasPrefix("+") || part.hasPrefix("-") ? part.dropFirst() : part[...]
                return String(bare.prefix { $0 != "=" })
            }
        )
        var count = 0
        let notFeatures: Set<String> = [
            "realized", "hotpluggable", "hotplugged", "start-powered-off", "check", "enforce", "migratable", "kvm",
            "pmu",
            "cpuid-0xb", "fill-mtrr-mask", "host-phys-bits", "host-cache-info", "legacy-cache", "tcg-cpuid",
            "full-cpuid-auto-level", "vmware-cpuid-freq", "l3-cache", "cpuid", "xen-vapic",
        ]
        let expansion = try await monitor.expansion(of: result.processor)
        for (name, value) in expansion.sorted(by: { $0.key < $1.key }) {
            guard value.bool != nil, !name.contains("_"), !named.contains(name), !notFeatures.contains(name),
                !name.hasPrefix("x-"), !name.hasPrefix("hv-"),
                let now = try await monitor.property(name, of: path)?.bool
            else { continue }
            parts.append("\(name)=\(now ? "on" : "off")")
            count += 1
        }
        guard count > 0, let index = options.lastIndex(where: { $0.name == "cpu" }) else { return }
        options[index].argument = parts.map(KeyValue.escape).joined(separator: ",")
        note("-cpu \(given): fixed with \(count) features as they are now")
    }

    // MARK: secrets

    /// The values of secrets travel by themselves, and their ids stay in the command line.
    private mutating func takeSecrets() async throws {
        let store = ObjectStore()
        // A guest that came here has its secrets sealed with a key that only its process holds.
        let keyPath = "/objects/\(MasterKey.id)"
        if options.contains(where: { $0.argument?.contains("keyid=\(MasterKey.id)") == true }),
            let file = try await monitor.property("file", of: keyPath)?.string,
            let number = file.split(separator: "/").last,
            let pid = emulator?.process.pid
        {
            try? store.add(
                ObjectDescription(parsing: "secret,id=\(MasterKey.id),format=raw,file=/proc/\(pid)/fd/\(number)")
            )
        }
        // A secret may be encrypted with another one.
        for index in options.indices where options[index].name == "object" {
            var settings = try BlockOptions(parsing: options[index].argument ?? "", implied: "qom-type")
            guard settings["qom-type"] == "secret", let id = settings["id"] else { continue }
            if let file = settings["file"] { settings.set("file", .string(resolve(file))) }
            do {
                // The damage of a secret in clear is done; what is left is to carry it on in a better way.
                if let clear = settings["data"], !settings.has("keyid") {
                    let descriptor = xd_memory_file("crossdock-secret")
                    guard descriptor >= 0 else { throw ChannelError.system("make a file in memory", errno) }
                    try DurableFile.append(Array(clear.utf8), to: descriptor, path: "a file in memory")
                    lseek(descriptor, 0, SEEK_SET)
                    settings.remove("data")
                    settings.set("fd", .string("\(descriptor)"))
                }
                try store.add(ObjectDescription(parsing: settings.text))
                result.secrets[id] = try store.secret(id).bytes
            } catch {
                block("The secret '\(id)' of the guest cannot be read here: \(error)")
            }
            options[index].argument = "secret,id=\(id)"
            note("-object secret,id=\(id): its value travels encrypted, outside of the command line")
        }
    }

    // MARK: disks

    private mutating func matchDisks(_ graph: BlockGraph) throws {
        var claimed: Set<String> = []
        let references = try result.commandLine.paths()
        for reference in references {
            let path = resolve(reference.path)
            result.resolved[reference.path] = path
            if reference.kind == .file || reference.kind == .disk {
                var status = stat()
                if stat(path, &status) == 0 { result.sizes[reference.path] = UInt64(status.st_size) }
            }
            guard reference.kind == .disk else { continue }
            guard let disk = result.disks.first(where: { $0.isLocal && $0.path == path }) else {
                throw GuestError(
                    "The disk \(reference.path) of \(reference.option) is not attached to the running guest"
                )
            }
            claimed.insert(disk.node)
            if disk.isEncrypted { result.keySecret[reference.path] = keySecret(reference.path) }
            result.diskOfPath[reference.path] = disk
            result.sizes[reference.path] = disk.size
        }
        let files = Set(references.filter { $0.kind == .file }.map { resolve($0.path) })
        for disk in result.disks
        where disk.isLocal && disk.isReadOnly && !claimed.contains(disk.node) && !files.contains(disk.path) {
            throw GuestError(
                "The disc \(disk.path) (\(disk.name)) was put in at run time and cannot be described; eject it first"
            )
        }
        for disk in result.disks where disk.isLocal && !disk.isReadOnly && !claimed.contains(disk.node) {
            throw GuestError("The disk \(disk.path) (\(disk.name)) is not in the guest's command line; detach it first")
        }
    }

    /// The secret that the definition of a disk names.
    private func keySecret(_ path: String) -> String? {
        for option in options where option.name == "drive" || option.name == "blockdev" {
            guard let settings = try? BlockOptions(parsing: option.argument ?? "", implied: "driver") else { continue }
            let isMeant =
                ["file", "file.filename", "filename"].contains { settings[$0] == path }
                || settings["file"].map { child in
                    options.contains {
                        $0.name == "blockdev" && $0.value("node-name") == child && $0.value("filename") == path
                    }
                } ?? false
            guard isMeant else { continue }
            if let id = settings["encrypt.key-secret"] ?? settings["key-secret"] { return id }
        }
        return nil
    }

    private mutating func checkBlockState(_ graph: BlockGraph) async throws {
        for disk in result.disks where !disk.isLocal && !disk.isNetwork && !disk.isNull {
            block("The disk \(disk.name) is of the kind '\(disk.protocolDriver)', which depends on this host")
        }
        for disk in result.disks where disk.isLocal && disk.isStacked {
            block(
                "The disk \(disk.name) has a format within a format (\(disk.format) on top), which cannot be described"
            )
        }
        for option in options where option.name == "drive" || option.name == "blockdev" {
            guard let settings = try? BlockOptions(parsing: option.argument ?? "", implied: "driver"),
                settings.leaves.contains(where: { $0.key == "offset" || $0.key.hasSuffix(".offset") })
            else { continue }
            block(
                "The disk of -\(option.name) \(option.argument ?? "") is a slice of a file, which cannot be described"
            )
        }
        for disk in result.disks where !disk.isReadOnly {
            if !disk.snapshots.isEmpty {
                block(
                    "The disk \(disk.name) has internal snapshots (\(disk.snapshots.joined(separator: ", "))), which would stay "
                        + "behind; delete them first"
                )
            }
        }
        for export in try await monitor.blockExports() {
            block(
                "The node \(export.node) is exported as '\(export.id)', and who uses that would be left behind; end the export first"
            )
        }
        for job in try await monitor.execute("query-jobs").array where job["type"]?.string != nil {
            let id = job["id"]?.string ?? ""
            if !id.hasPrefix("xd-") {
                block("A block job is under way: '\(id)' (\(job["type"]?.string ?? "")); wait for it or cancel it")
            }
        }
    }
}
