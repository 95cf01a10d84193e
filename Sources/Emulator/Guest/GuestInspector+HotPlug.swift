internal import IO

extension GuestInspector {
    func ids(_ name: String) -> Set<String> {
        Set(options.filter { $0.name == name }.compactMap { $0.value("id") })
    }

    mutating func followHotPlug(_ graph: BlockGraph) async throws {
        let devices = try await monitor.members(of: "/machine/peripheral").filter { $0.childType != nil }
        let present = Set(devices.map(\.name))
        options.removeAll { option in
            guard option.name == "device", let id = option.value("id"), !present.contains(id) else { return false }
            result.changes.append("-device \(option.argument ?? ""): unplugged, left out")
            return true
        }
        // One that was unplugged and plugged in again is what it is now.
        for device in devices where ids("device").contains(device.name) {
            guard try await monitor.property("hotplugged", of: "/machine/peripheral/\(device.name)")?.bool == true
            else {
                continue
            }
            options.removeAll { $0.name == "device" && $0.value("id") == device.name }
            note("-device ...,id=\(device.name): unplugged and plugged in again")
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
        for device in try await inOrder(devices.filter { !known.contains($0.name) }) {
            try await addDevice(device.name, device.childType ?? "", graph)
        }
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

    /// Devices in an order in which they can be made: each after the one that it is plugged into. QEMU lists them in none.
    private func inOrder(_ devices: [QMPClient.ObjectMember]) async throws -> [QMPClient.ObjectMember] {
        var pending: [(device: QMPClient.ObjectMember, parent: String, depth: Int)] = []
        for device in devices {
            let path = "/machine/peripheral/\(device.name)"
            let bus =
                try await monitor.property("parent_bus", of: path)?.string?.split(separator: "/").map(String.init) ?? []
            let place = bus.firstIndex(of: "peripheral").map { $0 + 1 } ?? bus.endIndex
            // A port of a hub is told by the ports on the way: 1.2 is a port of the hub in port 1.
            let depth = usbPorts[device.name]?.split(separator: ".").count ?? 0
            pending.append((device, bus.indices.contains(place) ? bus[place] : "", depth))
        }
        pending.sort { ($0.depth, $0.device.name) < ($1.depth, $1.device.name) }
        var ordered: [QMPClient.ObjectMember] = []
        while !pending.isEmpty {
            let waiting = Set(pending.map(\.device.name))
            let ready = pending.filter { !waiting.contains($0.parent) }
            // A circle cannot be; nothing is lost if there is one.
            let next = ready.isEmpty ? pending : ready
            ordered += next.map(\.device)
            let done = Set(next.map(\.device.name))
            pending.removeAll { done.contains($0.device.name) }
        }
        return ordered
    }

    /// A disc that was ejected or changed since is the one that the guest has now.
    mutating func followMedia(_ graph: BlockGraph) throws {
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
                !DriveDefinition.isNetwork(given), !present.contains(resolve(given))
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
        "iothread", "memory-backend-ram", "memory-backend-memfd", "memory-backend-shm", "secret", "rng-random",
        "rng-builtin",
        "throttle-group",
        "tls-creds-x509", "tls-creds-psk", "tls-creds-anon", "cryptodev-backend-builtin",
    ]

    private mutating func addObjects() async throws {
        let known = ids("object")
        let standard = try await monitor.execute("query-machines").array.compactMap { $0["default-ram-id"]?.string }
        for object in try await monitor.members(of: "/objects") {
            guard let type = object.childType else { continue }
            if known.contains(object.name), type.hasPrefix("memory-backend-") {
                // It may have been removed and added again.
                try await followSize(object.name)
            }
            guard !known.contains(object.name), !standard.contains(object.name) else { continue }
            // From 11.1 on monitors are objects; none of them is the guest's.
            if object.name == MasterKey.id || ["monitor-qmp", "monitor-hmp"].contains(type) { continue }
            guard Self.plainObjects.contains(type) else {
                block("The object '\(object.name)' of type \(type) was added at run time and cannot be described")
                continue
            }
            let path = "/objects/\(object.name)"
            // Known to every QEMU, and the same to the guest.
            let made = type == "memory-backend-shm" ? "memory-backend-memfd" : type
            var parts = ["\(made),id=\(KeyValue.escape(object.name))"]
            let names: [String: [String]] = [
                "memory-backend-ram": ["size", "share"], "memory-backend-memfd": ["size", "share"],
                "memory-backend-shm": ["size", "share"],
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

    private mutating func followSize(_ id: String) async throws {
        guard let size = try await monitor.property("size", of: "/objects/\(id)")?.integer,
            let index = options.firstIndex(where: { $0.name == "object" && $0.value("id") == id })
        else { return }
        var settings = try BlockOptions(parsing: options[index].argument ?? "", implied: "qom-type")
        settings.set("size", .integer(size))
        options[index].argument = settings.text
    }

    private mutating func addCharacterDevices() async throws {
        let known = ids("chardev")
        let automatic = ["compat_monitor", "serial", "parallel", "gdb", "debugcon", "crossdock-"]
        for device in try await monitor.execute("query-chardev").array {
            // What is under a multiplexer has its name with "-base".
            guard let label = device["label"]?.string, !known.contains(label),
                !(label.hasSuffix("-base") && known.contains(String(label.dropLast("-base".count)))),
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
            var types: [String]?
            for property in try await monitor.deviceProperties(type)
            where !property.type.hasPrefix("child<") && !property.isInternal {
                let name = property.name
                guard let value = try await monitor.property(name, of: path) else { continue }
                if let text = value.string, text.isEmpty { continue }
                if name == "addr", Self.isPCIAddress(property.type), let number = value.integer {
                    settings[name] = .string(Self.address(number))
                } else if property.isReference {
                    // A part of its own is made with it.
                    guard let target = value.string, !target.hasPrefix("\(path)/") else { continue }
                    settings[name] = .string(target.split(separator: "/").last.map(String.init) ?? "")
                } else if !property.isConfiguration || value == .null || !value.object.isEmpty || !value.array.isEmpty
                    || name == "bootindex" && value == -1
                {
                    continue
                } else {
                    if types == nil {
                        types = try await [type] + monitor.members(of: path).compactMap(\.childType)
                    }
                    if try await machineDefaults().give(value, to: property, ofAny: types ?? []) { continue }
                    settings[name] = value
                }
            }
            if let bus = try await monitor.property("parent_bus", of: path)?.string?.split(separator: "/").last {
                settings["bus"] = .string(String(bus))
            }
        }
        if let port = usbPorts[id] { settings["port"] = .string(port) }
        if let drive = settings["drive"]?.string { try addDrive(drive, graph) }
        options.append(GuestOption("device", JSONValue.object(settings).text))
        note("-device \(type),id=\(id): plugged in at run time")
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
}
