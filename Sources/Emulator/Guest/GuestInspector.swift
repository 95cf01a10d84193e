internal import IO
internal import TLS

/// The work behind a `GuestInspection`.
struct GuestInspector {
    let monitor: QMPClient
    let emulator: RunningEmulator?
    var options: [GuestOption] = []
    /// Where `/dev/fdset/N` leads.
    var sets: [String: String] = [:]
    var result: GuestInspection
    private var defaults: MachineDefaults?
    /// The ports of USB devices by their ids.
    var usbPorts: [String: String] = [:]
    /// Other names of types of devices; read when they are asked for first.
    var aliases: [String: String]?

    init(_ monitor: QMPClient, _ commandLine: GuestCommandLine, _ emulator: RunningEmulator?) {
        self.monitor = monitor
        self.emulator = emulator
        result = GuestInspection(commandLine: commandLine)
    }

    mutating func block(_ reason: String) {
        if !result.blockers.contains(reason) { result.blockers.append(reason) }
    }

    mutating func note(_ change: String) { result.changes.append(change) }

    /// What the guest's machine type sets; read when it is asked for first.
    mutating func machineDefaults() async throws -> MachineDefaults {
        if let defaults { return defaults }
        let read = try await MachineDefaults(of: result.machine, monitor)
        defaults = read
        return read
    }

    func resolve(_ path: String) -> String {
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
        for disk in graph.disks where disk.isLocal { blockWhatCannotBeOpenedAgain(disk.path) }
        result.disks = graph.disks.map { disk in
            var disk = disk
            if disk.isLocal { disk.path = resolve(disk.path) }
            for index in disk.backing.indices where disk.backing[index].protocolDriver == "file" {
                disk.backing[index].path = resolve(disk.backing[index].path)
            }
            return disk
        }
        usbPorts = try await monitor.usbPorts()
        do {
            options = try result.commandLine.options()
            try readConfigurations()
            dropWhatIsOver()
            try await resolveDescriptors()
            try makeMemoryAnonymous()
            try await followHotPlug(graph)
            try followMedia(graph)
            try await followLimits(graph)
            try await freeze()
            try await takeSecrets()
            result.commandLine = GuestCommandLine(
                program: result.commandLine.program,
                options: options,
                directory: result.commandLine.directory
            )
            try matchDisks(graph)
            // What a destination refuses for what it is, it is here already that says so.
            try await findNetworks()
            _ = try result.commandLine.withoutNetworkPrograms.relocated { reference in
                var placement = GuestCommandLine.Placement(path: reference.path)
                placement.isFlattened = true
                return placement
            }
        } catch let error as GuestError {
            block(error.message)
            result.immovable.insert(error.message)
        }
        try await checkBlockState(graph)
        // The same disk is meant by whoever speaks of it.
        for disk in result.disks {
            result.sizes[disk.name] = disk.size
        }
        for node in graph.nodes.values { result.sizes[node.name] = node.size }
    }

    /// QEMU opens an image once more when it gives its locks up at the switchover, by the name that it knows.
    private mutating func blockWhatCannotBeOpenedAgain(_ path: String) {
        guard let emulator, !path.hasPrefix("/"), resolve(path) != DurableFile.resolve(path, in: emulator.directory)
        else { return }
        block(
            "The image '\(path)' is in \(resolve(path)), and QEMU, which has left that directory (-daemonize), would not find it again at "
                + "the switchover; start the guest with the whole path"
        )
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
        options = GuestCommandLine.monitorForms(options)
        options.removeAll { option in
            switch option.name {
            case "incoming", "S", "loadvm": true
            case "chardev": option.value("id").map(own.contains) ?? false
            default: GuestCommandLine.monitorDevice(option).map(own.contains) ?? false
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
            if settings["qom-type"] == "memory-backend-shm" {
                // The same to the guest, and known to QEMU before 9.1 too.
                settings.set("qom-type", "memory-backend-memfd")
                if !settings.has("share") { settings.set("share", "on") }
                note("-object \(options[index].argument ?? ""): anonymous memory takes its place")
                options[index].argument = settings.text
                continue
            }
            guard settings["qom-type"] == "memory-backend-file", let path = settings["mem-path"],
                HugePages.root(of: resolve(path)) == nil, !settings.isOn("pmem"), !settings.isOn("readonly")
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
        where HugePages.root(of: resolve(path)) == nil {
            note("-mem-path \(path): anonymous memory takes the file's place")
            options.removeAll { $0.name == "mem-path" && $0.argument == path }
        }
    }
}
