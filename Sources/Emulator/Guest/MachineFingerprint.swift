/// What a guest can see of its machine: the processor, the devices and what they are set to.
///
/// A migration stream does not tell about all of it: another set of processor features or one device more passes
/// unnoticed and changes the machine under the guest.
public struct MachineFingerprint: Sendable, Hashable, Codable {
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
    /// What the processor's model stands for on this QEMU and host (`query-cpu-model-expansion`), as text.
    public var model: [String: String] = [:]
    /// The types of all devices by their place in QEMU's object model; devices without a place of their own are counted:
    /// "unattached TYPE".
    public var devices: [String: String] = [:]
    /// What the devices are set to: "device property" to text.
    public var settings: [String: String] = [:]

    /// Properties that say where a device gets its data from, not what the guest sees.
    private static let hostSide: Set<String> = [
        "drive", "netdev", "chardev", "iothread", "memdev", "romfile", "vhost", "hotplugged", "rng", "cryptodev",
        "discard_granularity", "cyls", "heads", "secs", "write-cache", "werror", "rerror", "romsize",
        "failover_pair_id",
    ]
    private static let processorSide: Set<String> = [
        "hotplugged", "realized", "crash-information", "memory", "type", "parent_bus", "filtered-features",
        "tsc-frequency", "unavailable-features",
    ]

    /// Reads a machine.
    public init(of monitor: QMPClient) async throws {
        machine = try await monitor.machineType()
        memory = try await monitor.baseMemory()
        processors = try await monitor.execute("query-cpus-fast").array.count
        topology = try await monitor.property("smp", of: "/machine")?.object.mapValues(\.text) ?? [:]
        // Processors that were plugged in are counted above.
        topology["cpus"] = nil
        if let path = try await monitor.firstProcessor() {
            for member in try await monitor.members(of: path)
            where member.childType == nil && !member.type.hasPrefix("link<")
                && !Self.processorSide.contains(member.name)
                && !member.name.contains("_")
            {
                guard let value = try await monitor.property(member.name, of: path), value.array.isEmpty else {
                    continue
                }
                processor[member.name] = value.text
            }
            if let model = try await monitor.processorModel() {
                for (name, value) in try await monitor.expansion(of: model)
                where value.bool != nil && !name.contains("_") {
                    self.model[name] = value.text
                }
            }
        }
        var standards: [String: [(name: String, type: String, standard: JSONValue?)]] = [:]
        try await walk(monitor, "/machine", depth: 0, &standards)
    }

    private mutating func walk(
        _ monitor: QMPClient,
        _ path: String,
        depth: Int,
        _ standards: inout [String: [(name: String, type: String, standard: JSONValue?)]]
    ) async throws {
        guard depth < 8, devices.count < 5000 else { return }
        for member in try await monitor.members(of: path) {
            guard let type = member.childType, !["memory-region", "irq"].contains(where: type.hasSuffix) else {
                continue
            }
            let child = "\(path)/\(member.name)"
            if type != "container" {
                if child.hasPrefix("/machine/unattached/") {
                    // Their numbers depend on the order in which they were made.
                    if depth == 1 {
                        let key = "unattached \(type)"
                        devices[key] = "\((devices[key].flatMap { Int($0) } ?? 0) + 1)"
                    }
                } else {
                    devices[child] = type
                }
            }
            if child.hasPrefix("/machine/peripheral"), depth == 1 {
                if standards[type] == nil { standards[type] = try await monitor.deviceProperties(type) }
                for (name, kind, _) in standards[type] ?? []
                where !Self.hostSide.contains(name) && !kind.hasPrefix("link<") && !kind.hasPrefix("child<") {
                    guard let value = try await monitor.property(name, of: child) else { continue }
                    settings["\(child) \(name)"] = value.text
                }
            }
            if !child.hasPrefix("/machine/unattached/") { try await walk(monitor, child, depth: depth + 1, &standards) }
        }
    }

    /// How another machine differs, a sentence each; empty when a guest could not tell them apart.
    ///
    /// - Parameter other: the machine on the other host.
    public func differences(from other: MachineFingerprint) -> [String] {
        var reasons: [String] = []
        if machine != other.machine {
            reasons.append("The machine is \(machine) here and \(other.machine) there")
        }
        if memory != other.memory {
            reasons.append("The guest has \(memory >> 20) MiB of memory here and \(other.memory >> 20) MiB there")
        }
        if processors != other.processors {
            reasons.append("The guest has \(processors) processors here and \(other.processors) there")
        }
        reasons += Self.compare(topology, other.topology).map { name, here, there in
            "The guest's processors have \(name)=\(here ?? "(none)") here and \(there ?? "(none)") there"
        }
        reasons += Self.compare(processor, other.processor).prefix(40).map { name, here, there in
            switch (here, there) {
            case ("true", "false"): "The processor feature '\(name)' is on here and off there"
            case ("false", "true"): "The processor feature '\(name)' is off here and on there"
            default: "The processor's '\(name)' is \(here ?? "missing") here and \(there ?? "missing") there"
            }
        }
        var changed: Set<String> = []
        reasons += Self.compare(devices, other.devices).prefix(40).compactMap { path, here, there in
            changed.insert(path)
            // What is inside of a device comes and goes with it.
            let parent = path.split(separator: "/").dropLast().joined(separator: "/")
            if changed.contains("/\(parent)") { return nil }
            if path.hasPrefix("unattached ") {
                let type = path.dropFirst("unattached ".count)
                return "There are \(here ?? "0") built-in devices of type \(type) here and \(there ?? "0") there"
            }
            return switch (here, there) {
            case (nil, let there?): "The device \(Self.short(path)) (\(there)) is there and not here"
            case (let here?, nil): "The device \(Self.short(path)) (\(here)) is here and not there"
            default: "The device \(Self.short(path)) is a \(here ?? "") here and a \(there ?? "") there"
            }
        }
        reasons += Self.compare(settings, other.settings).prefix(40).compactMap { key, here, there in
            let path = String(key.prefix { $0 != " " })
            if changed.contains(path) { return nil }
            let name = key.drop { $0 != " " }.dropFirst()
            return "The device \(Self.short(path)) has \(name)=\(here ?? "(none)") here and \(there ?? "(none)") there"
        }
        return reasons
    }

    private static func short(_ path: String) -> String {
        for prefix in ["/machine/peripheral/", "/machine/peripheral-anon/", "/machine/"] where path.hasPrefix(prefix) {
            return "'\(path.dropFirst(prefix.count))'"
        }
        return "'\(path)'"
    }

    private static func compare(_ here: [String: String], _ there: [String: String]) -> [(String, String?, String?)] {
        Set(here.keys).union(there.keys).sorted().compactMap { key in
            here[key] == there[key] ? nil : (key, here[key], there[key])
        }
    }
}
