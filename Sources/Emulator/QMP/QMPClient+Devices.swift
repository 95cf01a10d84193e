/// The Unix socket of a character device, as `query-chardev` tells of it: `disconnected:unix:PATH,server=on`.
struct CharacterSocket {
    /// The path.
    let path: String
    /// Whether QEMU opened it.
    let isServer: Bool

    /// Reads an element of the answer; nil for a device that is no Unix socket.
    init?(_ device: JSONValue) {
        guard var name = device["filename"]?.string else { return nil }
        if name.hasPrefix("disconnected:") { name = String(name.dropFirst("disconnected:".count)) }
        guard name.hasPrefix("unix:") else { return nil }
        path = String(name.dropFirst("unix:".count).prefix { $0 != "," })
        isServer = name.contains("server")
    }
}

extension QMPClient {
    /// A member of an object of QEMU's object model.
    struct ObjectMember {
        var name: String
        var type: String

        /// The type of a child object; nil when it is a plain property.
        var childType: String? {
            type.hasPrefix("child<") ? String(type.dropFirst(6).dropLast()) : nil
        }
    }

    /// The members of an object (`qom-list`).
    func members(of path: String) async throws -> [ObjectMember] {
        try await execute("qom-list", ["path": .string(path)]).array.compactMap { member in
            guard let name = member["name"]?.string, let type = member["type"]?.string else { return nil }
            return ObjectMember(name: name, type: type)
        }
    }

    /// A property of an object (`qom-get`); nil when it cannot be read.
    func property(_ name: String, of path: String) async throws -> JSONValue? {
        do {
            return try await execute("qom-get", ["path": .string(path), "property": .string(name)])
        } catch let error as QMPError where error.code == .refused { return nil }
    }

    /// Several properties of an object; those that cannot be read are left out.
    func properties(_ names: [String], of path: String) async throws -> [String: JSONValue] {
        let answers = try await executeEach(
            "qom-get",
            names.map { ["path": .string(path), "property": .string($0)] }
        )
        return zip(names, answers).reduce(into: [:]) { found, pair in found[pair.0] = pair.1 }
    }

    /// Several properties of a processor, which are asked for once in the life of this connection.
    func processorProperties(_ names: [String], of path: String) async throws -> [String: JSONValue] {
        var known = processorProperties[path] ?? [:]
        var unknown = names.filter { known[$0] == nil }
        // An answer of some kilobytes is not worth it for a few.
        if unknown.count > 16, let words = try await property("feature-words", of: path) {
            known.merge(ProcessorFeatureWords.read(unknown, from: words).mapValues { .some($0) }) { $1 }
            unknown.removeAll { known[$0] != nil }
        }
        let read = try await properties(unknown, of: path)
        for name in unknown { known[name] = .some(read[name]) }
        processorProperties[path] = known
        return names.reduce(into: [:]) { found, name in found[name] = known[name] ?? nil }
    }

    /// The QOM path of the first processor (`query-cpus-fast`).
    func firstProcessor() async throws -> String? {
        try await execute("query-cpus-fast").array.first?["qom-path"]?.string
    }

    /// The processor's model: "qemu64", "host".
    func processorModel() async throws -> String? {
        guard let path = try await firstProcessor(), let type = try await property("type", of: path)?.string else {
            return nil
        }
        // The architecture is between the model and the suffix: qemu64-x86_64-cpu.
        guard type.hasSuffix("-cpu"), let end = type.dropLast(4).lastIndex(of: "-") else { return type }
        return String(type[..<end])
    }

    /// The guest's memory at its start, in bytes (`query-memory-size-summary`).
    public func baseMemory() async throws -> UInt64 {
        UInt64(clamping: try await execute("query-memory-size-summary")["base-memory"]?.integer ?? 0)
    }

    /// The memory that devices have of their own, in bytes: video memory, firmware, ROMs (`x-query-ramblock`, QEMU 6.2, as text). The
    /// guest's own memory is not among it.
    public func deviceMemory() async throws -> UInt64 {
        let text: String
        do {
            text = try await execute("x-query-ramblock")["human-readable-text"]?.string ?? ""
        } catch let error as QMPError where error.code == .refused { return 0 }
        // The first line has titles; the total of a block is the sixth word of its line.
        let all = text.split(separator: "\n").dropFirst().reduce(UInt64(0)) { sum, line in
            let words = line.split(separator: " ").drop { !$0.hasPrefix("0x") }
            guard words.count >= 3, let total = words.dropFirst(2).first else { return sum }
            return sum.addingSaturated(UInt64(total.dropFirst(2), radix: 16) ?? 0)
        }
        let summary = try await execute("query-memory-size-summary")
        let own = ["base-memory", "plugged-memory"].reduce(UInt64(0)) { sum, key in
            sum.addingSaturated(UInt64(clamping: summary[key]?.integer ?? 0))
        }
        return all - min(all, own)
    }

    /// The Unix socket of the guest agent's port, when a program in the guest has opened the port; nil otherwise.
    public func guestAgentSocket() async throws -> String? {
        for container in ["/machine/peripheral", "/machine/peripheral-anon"] {
            for member in try await members(of: container) where member.childType == "virtserialport" {
                let path = "\(container)/\(member.name)"
                guard try await property("name", of: path)?.string == "org.qemu.guest_agent.0",
                    let label = try await property("chardev", of: path)?.string
                else { continue }
                for device in try await execute("query-chardev").array where device["label"]?.string == label {
                    guard device["frontend-open"]?.bool == true else { continue }
                    if let socket = CharacterSocket(device) { return socket.path }
                }
            }
        }
        return nil
    }

    /// The I/O thread that serves a disk's device, or its controller; nil when QEMU's main thread does.
    public func ioThread(of device: String) async throws -> String? {
        let suffix = "/virtio-backend"
        var path = device.hasSuffix(suffix) ? String(device.dropLast(suffix.count)) : device
        for _ in 0..<4 {
            if let thread = try await property("iothread", of: path)?.string, !thread.isEmpty { return thread }
            // A disk of a SCSI controller: the controller is where its bus is.
            guard let bus = try await property("parent_bus", of: path)?.string else { return nil }
            let parts = bus.split(separator: "/")
            guard let root = parts.firstIndex(where: { $0.hasPrefix("peripheral") }), parts.count > root + 1 else {
                return nil
            }
            let parent = "/" + parts[...(root + 1)].joined(separator: "/")
            guard parent != path else { return nil }
            path = parent
        }
        return nil
    }

    /// Whether QEMU is at least of a version.
    public func isAtLeast(_ major: Int, _ minor: Int) -> Bool {
        Self.release(of: version).map { $0 >= (major, minor) } ?? false
    }

    /// Whether a version, as QEMU says it, is this one or a later one; false for one that cannot be read.
    public static func isVersion(_ version: String, atLeast other: (Int, Int)) -> Bool {
        release(of: version).map { $0 >= other } ?? false
    }

    /// The major and minor number of a version, "10.0.13"; nil for what is none.
    static func release(of version: String) -> (Int, Int)? {
        let parts = version.split(separator: ".").compactMap { Int($0) }
        return parts.count >= 2 ? (parts[0], parts[1]) : nil
    }
}
