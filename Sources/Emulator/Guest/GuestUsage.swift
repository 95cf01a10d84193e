internal import IO

/// What a guest may take of a host.
public struct GuestUsage: Sendable, Hashable, Codable {
    /// Bytes of memory, with what can be plugged in.
    public var memory: UInt64
    /// Processors, with those that can be plugged in.
    public var processors: UInt64
    /// Bytes of its disks and files.
    public var disk: UInt64

    /// Describes what a guest takes.
    public init(memory: UInt64 = 0, processors: UInt64 = 0, disk: UInt64 = 0) {
        self.memory = memory
        self.processors = processors
        self.disk = disk
    }

    /// Both together; what is too much for 64 bits is the most that they can say.
    public static func + (one: GuestUsage, other: GuestUsage) -> GuestUsage {
        GuestUsage(
            memory: one.memory.addingSaturated(other.memory),
            processors: one.processors.addingSaturated(other.processors),
            disk: one.disk.addingSaturated(other.disk)
        )
    }
}

extension UInt64 {
    /// The sum, or the most that there is.
    public func addingSaturated(_ other: UInt64) -> UInt64 {
        let (sum, isTooMuch) = addingReportingOverflow(other)
        return isTooMuch ? .max : sum
    }

    /// The product, or the most that there is.
    func multipliedSaturated(_ other: UInt64) -> UInt64 {
        let (product, isTooMuch) = multipliedReportingOverflow(by: other)
        return isTooMuch ? .max : product
    }
}

extension GuestCommandLine {
    /// The machine's memory when nothing is said about it (`MachineClass.default_ram_size` of most of QEMU's machines).
    private static let defaultMemory: UInt64 = 128 << 20

    /// Properties of devices that say how much memory they take beside the blocks that QEMU tells of, with their units.
    private static let deviceBuffers = ["cmb_size_mb": "m", "max_hostmem": "b"]
    /// `max_hostmem` of virtio-gpu when it is not given.
    private static let displayMemory: UInt64 = 256 << 20

    /// Bytes of memory that the guest may have: what it starts with, or what it may grow to, and its memory objects.
    ///
    /// - Throws: `GuestError` for a size that is none.
    public func memory() throws -> UInt64 {
        var size: UInt64?
        var most: UInt64 = 0
        var objects: UInt64 = 0
        var isMadeOfObjects = false
        for option in try options() {
            let parsed = try ParsedOption(ofOriginal: option)
            func bytes(_ key: String, unit: String = "b") throws -> [UInt64] {
                // Where a key is given several times, the largest one counts.
                try parsed.settings.leaves.filter { $0.key == key }.map { leaf in
                    guard let bytes = ByteSize.parse(leaf.value, unit: unit) else {
                        throw parsed.refusal("'\(leaf.value)' is no size")
                    }
                    return bytes
                }
            }
            switch option.name {
            case "m":
                size = try bytes("size", unit: "m").reduce(size ?? 0, max)
                most = try bytes("maxmem").reduce(most, max)
            case "machine", "M":
                if let stated = try bytes("memory.size").max() { size = max(size ?? 0, stated) }
                most = try bytes("memory.max-size").reduce(most, max)
                if parsed.settings.has("memory-backend") { isMadeOfObjects = true }
            case "numa": if parsed.settings.has("memdev") { isMadeOfObjects = true }
            // Buffers of character devices.
            case "chardev" where ["ringbuf", "memory"].contains(parsed.settings["backend"]):
                objects = try bytes("size").reduce(objects) { $0.addingSaturated($1) }
            case "device":
                for (key, unit) in Self.deviceBuffers {
                    objects = try bytes(key, unit: unit).reduce(objects) { $0.addingSaturated($1) }
                }
                // What such a device keeps for its guest when nothing is said.
                let driver = parsed.settings["driver"] ?? ""
                if ["virtio-gpu", "virtio-vga"].contains(where: driver.hasPrefix), !parsed.settings.has("max_hostmem") {
                    objects = objects.addingSaturated(Self.displayMemory)
                }
            case "vga" where parsed.argument == "virtio": objects = objects.addingSaturated(Self.displayMemory)
            case "set":
                // device.ID.KEY=VALUE says the same as KEY=VALUE of that device.
                let parts = parsed.argument.split(separator: "=", maxSplits: 1).map(String.init)
                guard parts.count == 2, let key = parts[0].split(separator: ".").last,
                    let unit = Self.deviceBuffers[String(key)]
                else { continue }
                guard let bytes = ByteSize.parse(parts[1], unit: unit) else {
                    throw parsed.refusal("'\(parts[1])' is no size")
                }
                objects = objects.addingSaturated(bytes)
            case "global" where Self.deviceBuffers.keys.contains(where: { parsed.argument.contains($0) }):
                throw parsed.refusal("it says how much memory devices take; say it of each device")
            case "object" where parsed.settings["qom-type"]?.hasPrefix("memory-backend-") == true:
                objects = try bytes("size").reduce(objects) { $0.addingSaturated($1) }
            default: continue
            }
        }
        let first = isMadeOfObjects ? 0 : size ?? Self.defaultMemory
        return max(most, size ?? 0, first.addingSaturated(objects))
    }

    /// How many processors the guest may have.
    ///
    /// - Throws: `GuestError` for a number that is none.
    public func processors() throws -> UInt64 {
        var most: UInt64 = 1
        // QEMU takes all of them together; the last of two equal ones counts.
        var topology: [String: UInt64] = [:]
        for option in try options() where ["smp", "machine", "M"].contains(option.name) {
            let parsed = try ParsedOption(ofOriginal: option)
            let prefix = option.name == "smp" ? "" : "smp."
            for leaf in parsed.settings.leaves where leaf.key.hasPrefix(prefix) {
                let key = leaf.key.dropFirst(prefix.count)
                guard Self.topology.contains(String(key)) || ["cpus", "maxcpus"].contains(key) else { continue }
                guard let number = UInt64(leaf.value) else { throw parsed.refusal("'\(leaf.value)' is no number") }
                guard number <= Self.mostProcessors else {
                    throw parsed.refusal("\(key)=\(number) is more than any QEMU has: \(Self.mostProcessors)")
                }
                if ["cpus", "maxcpus"].contains(key) {
                    most = max(most, number)
                } else {
                    topology[String(key)] = max(number, 1)
                }
            }
        }
        let product = topology.values.reduce(UInt64(1)) { $0.multipliedSaturated($1) }
        guard product <= Self.mostProcessors else {
            throw GuestError(
                "A guest of \(product) processors is none that QEMU has: \(Self.mostProcessors) are possible at most"
            )
        }
        return max(most, product)
    }

    /// Far beyond what any machine type takes; QEMU itself works for seconds on numbers that it will refuse.
    private static let mostProcessors: UInt64 = 1 << 16
    private static let topology: Set<String> = [
        "drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads",
    ]
}
