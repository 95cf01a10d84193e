internal import IO

/// What a guest can see of its machine: the processor, the devices and what they are set to.
///
/// A migration stream does not tell about all of it: another set of processor features or one device more passes
/// unnoticed and changes the machine under the guest.
public struct MachineFingerprint: Sendable, Hashable {
    /// The machine type with its version.
    public var machine = ""
    /// The memory at the start, in bytes.
    public var memory: UInt64 = 0
    /// How many processors.
    public var processors = 0
    /// How they are arranged: sockets, cores, threads, and how many there may be.
    public var topology: [String: String] = [:]
    /// The processor's properties (`qom-get`), as text.
    public var processor: [String: String] = [:]
    /// The types of all devices by their place in QEMU's object model; devices without a place of their own are counted:
    /// "unattached TYPE".
    public var devices: [String: String] = [:]
    /// What the devices are set to: "device property" to text.
    public var settings: [String: String] = [:]
    /// How many devices of each type the machine has by itself, wherever QEMU's object model keeps them: their places change
    /// between versions.
    public var builtIn: [String: Int] = [:]
    /// The type of each property: "TYPE property", with "processor" for the processor's.
    public var kinds: [String: String] = [:]
    /// The ports of USB devices by their ids, those that QEMU chose included.
    public var usbPorts: [String: String] = [:]
    /// The host's caches, when the guest sees them (`host-cache-info`, the default of `-cpu host`): no option can fix them.
    public var hostCaches: String?
    /// The default of each property that has one, as text, by the same names.
    public var standards: [String: String] = [:]

    /// Properties that say where a device gets its data from, not what the guest sees.
    private static let hostSide: Set<String> = [
        "drive", "netdev", "chardev", "audiodev", "iothread", "memdev", "romfile", "vhost", "hotplugged", "rng",
        "cryptodev",
        "discard_granularity", "cyls", "heads", "secs", "write-cache", "werror", "rerror", "romsize",
        "failover_pair_id",
    ]

    private static let processorSide: Set<String> = [
        "hotplugged", "realized", "crash-information", "memory", "type", "parent_bus", "filtered-features",
        "unavailable-features",
    ]

    /// Nothing is known yet.
    init() {}

    /// Reads a machine.
    public init(of monitor: QMPClient) async throws {
        machine = try await monitor.machineType()
        memory = try await monitor.baseMemory()
        processors = try await monitor.execute("query-cpus-fast").array.count
        topology = try await monitor.property("smp", of: "/machine")?.object.mapValues(\.text) ?? [:]
        // Processors that were plugged in are counted above.
        topology["cpus"] = nil
        if let path = try await monitor.firstProcessor() {
            let names = try await monitor.members(of: path).filter { member in
                member.childType == nil && !member.type.hasPrefix("link<")
                    && !Self.processorSide.contains(member.name) && !member.name.contains("_")
            }.map(\.name)
            for (name, value) in try await monitor.processorProperties(names, of: path) where value.array.isEmpty {
                // An agent of an earlier release does not look at it; it is 0 where it is not fixed.
                if name == "tsc-frequency", value == 0 { continue }
                processor[name] = value.text
            }
            let type = try await monitor.property("type", of: path)?.string ?? ""
            for property in try await monitor.deviceProperties(type) where processor[property.name] != nil {
                note(property, of: "processor")
            }
        }
        if processor["host-cache-info"] == "true" { hostCaches = Self.cachesOfThisHost() }
        usbPorts = try await monitor.usbPorts()
        var types: [String: [DeviceProperty]] = [:]
        try await walk(monitor, "/machine", depth: 0, &types)
    }

    /// The caches of this host's first processor, as the kernel tells of them: level, type, size, ways, bytes of a line.
    private static func cachesOfThisHost() -> String {
        let directory = "/sys/devices/system/cpu/cpu0/cache"
        return DurableFile.list(directory).filter { $0.hasPrefix("index") }.sorted().map { index in
            ["level", "type", "size", "ways_of_associativity", "coherency_line_size"].map { name in
                let bytes = ((try? DurableFile.read("\(directory)/\(index)/\(name)")) ?? nil) ?? []
                return String(decoding: bytes, as: UTF8.self).trimmed
            }.joined(separator: " ")
        }.joined(separator: ", ")
    }

    private mutating func note(_ property: DeviceProperty, of type: String) {
        kinds["\(type) \(property.name)"] = property.type
        standards["\(type) \(property.name)"] = property.standard?.text
    }

    private mutating func walk(
        _ monitor: QMPClient,
        _ path: String,
        depth: Int,
        _ types: inout [String: [DeviceProperty]]
    ) async throws {
        guard depth < 8, devices.count < 5000, builtIn.count < 5000 else { return }
        let isUnattached = path.hasPrefix("/machine/unattached")
        let isPlugged = path.hasPrefix("/machine/peripheral")
        for member in try await monitor.members(of: path) {
            guard let type = member.childType, !["memory-region", "irq"].contains(where: type.hasSuffix) else {
                continue
            }
            let child = "\(path)/\(member.name)"
            if type != "container" {
                if !isPlugged { builtIn[type, default: 0] += 1 }
                if !isUnattached {
                    devices[child] = type
                } else if depth == 1 {
                    // Their numbers depend on the order in which they were made.
                    let key = "unattached \(type)"
                    devices[key] = "\((devices[key].flatMap { Int($0) } ?? 0) + 1)"
                }
            }
            if isPlugged, depth == 1 {
                if types[type] == nil {
                    types[type] = try await monitor.deviceProperties(type)
                    for property in types[type] ?? [] { note(property, of: type) }
                }
                let names = (types[type] ?? []).filter { property in
                    !Self.hostSide.contains(property.name) && !property.isReference
                }.map(\.name)
                for (name, value) in try await monitor.properties(names, of: child) {
                    settings["\(child) \(name)"] = value.text
                }
            }
            try await walk(monitor, child, depth: depth + 1, &types)
        }
    }
}

extension MachineFingerprint: Codable {
    private enum Key: String, CodingKey {
        case machine, memory, processors, topology, processor, model, devices, settings, builtIn, kinds, standards,
            usbPorts, hostCaches
    }

    /// Decodes one, of an agent too that does not say how properties are to be read.
    public init(from decoder: any Decoder) throws {
        let container = try decoder.container(keyedBy: Key.self)
        machine = try container.decode(String.self, forKey: .machine)
        memory = try container.decode(UInt64.self, forKey: .memory)
        processors = try container.decode(Int.self, forKey: .processors)
        topology = try container.decode([String: String].self, forKey: .topology)
        processor = try container.decode([String: String].self, forKey: .processor)
        devices = try container.decode([String: String].self, forKey: .devices)
        settings = try container.decode([String: String].self, forKey: .settings)
        builtIn = try container.decodeIfPresent([String: Int].self, forKey: .builtIn) ?? [:]
        kinds = try container.decodeIfPresent([String: String].self, forKey: .kinds) ?? [:]
        standards = try container.decodeIfPresent([String: String].self, forKey: .standards) ?? [:]
        usbPorts = try container.decodeIfPresent([String: String].self, forKey: .usbPorts) ?? [:]
        hostCaches = try container.decodeIfPresent(String.self, forKey: .hostCaches)
    }

    /// Encodes it.
    public func encode(to encoder: any Encoder) throws {
        var container = encoder.container(keyedBy: Key.self)
        try container.encode(machine, forKey: .machine)
        try container.encode(memory, forKey: .memory)
        try container.encode(processors, forKey: .processors)
        try container.encode(topology, forKey: .topology)
        try container.encode(processor, forKey: .processor)
        // An agent of an earlier release expects it, and reads nothing from it.
        try container.encode([String: String](), forKey: .model)
        try container.encode(devices, forKey: .devices)
        try container.encode(settings, forKey: .settings)
        try container.encode(builtIn, forKey: .builtIn)
        try container.encode(kinds, forKey: .kinds)
        try container.encode(standards, forKey: .standards)
        try container.encode(usbPorts, forKey: .usbPorts)
        try container.encodeIfPresent(hostCaches, forKey: .hostCaches)
    }
}
