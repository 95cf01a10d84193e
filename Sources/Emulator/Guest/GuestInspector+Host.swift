internal import TLS

extension GuestInspector {
    mutating func freeze() async throws {
        let line = GuestCommandLine(program: "qemu", options: options, directory: "/")
        options = try line.pinned(machine: result.machine).options()
        if let smp = try await monitor.property("smp", of: "/machine")?.object, !smp.isEmpty {
            let names = [
                "cpus", "drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads", "maxcpus",
            ]
            let always = ["cpus", "sockets", "cores", "threads", "maxcpus"]
            var parts: [String] = []
            for name in names {
                guard let value = smp[name]?.integer else { continue }
                // Not every machine has dies, nor every QEMU modules.
                if value == 1, !always.contains(name) { continue }
                // Processors that were plugged in are devices of their own and not counted here.
                parts.append("\(name)=\(value)")
            }
            replace("smp", with: parts.joined(separator: ","))
        }
        if !options.contains(where: { Self.displays.contains($0.name) }) {
            // QEMU opened a window of this host, or listens for VNC on the first port that was free. The guest sees neither.
            options.append(GuestOption("display", "none"))
            result.changes.append("no -display: -display none; -vnc gives the guest a screen that moves with it")
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
            // The driver may be one of a device's other names, "virtio-net".
            let type: String
            if let id = settings["id"] {
                path = "/machine/peripheral/\(id)"
                type = try await monitor.property("type", of: path)?.string ?? driver
            } else {
                type = try await canonicalType(driver)
                let alike = anonymous.filter { $0.childType == type }
                let number = counts[type, default: 0]
                counts[type] = number + 1
                guard alike.indices.contains(number) else { continue }
                path = "/machine/peripheral-anon/\(alike[number].name)"
            }
            try await freezeDevice(index, settings, path, type)
        }
    }

    /// The options of which each says what becomes of the guest's screen.
    private static let displays: Set<String> = ["display", "nographic", "vnc", "spice", "sdl", "curses"]

    /// The type that a driver's name means: `virtio-net` is `virtio-net-pci` on a PC.
    private mutating func canonicalType(_ driver: String) async throws -> String {
        if aliases == nil { aliases = try await monitor.deviceAliases() }
        return aliases?[driver] ?? driver
    }

    mutating func replace(_ name: String, with argument: String, shown: String? = nil) {
        let old = options.last { $0.name == name }?.argument
        guard old != argument else { return }
        options.removeAll { $0.name == name }
        options.append(GuestOption(name, argument))
        note("-\(name) \(old ?? "(not given)"): fixed as \(shown ?? argument)")
    }

    /// Whether an address of this type is a slot and a function; that of a memory module is a number of bytes.
    static func isPCIAddress(_ type: String?) -> Bool { type == "int32" || type == "str" }

    /// A PCI address as QEMU reads it: slot and function, hexadecimal.
    static func address(_ number: Int64) -> String {
        "\(String(number >> 3, radix: 16)).\(String(number & 7, radix: 16))"
    }

    /// What QEMU chooses for a device by the order of devices, the number of processors or the network's properties.
    private mutating func freezeDevice(
        _ index: Int,
        _ settings: BlockOptions,
        _ path: String,
        _ type: String
    ) async throws {
        var settings = settings
        var fixed: [String] = []
        let properties = try await monitor.deviceProperties(type)
        // Memory modules have an address of another kind.
        let isPCI = properties.contains { $0.name == "addr" && Self.isPCIAddress($0.type) }
        // What is given as it would be anyway is left out by a QEMU that does not know it.
        var parts: [String]?
        for property in properties where property.standard != nil {
            guard let given = settings[property.name], let value = try await monitor.property(property.name, of: path)
            else { continue }
            if parts == nil { parts = try await [type] + monitor.members(of: path).compactMap(\.childType) }
            if try await machineDefaults().give(value, to: property, ofAny: parts ?? []) {
                result.standards["\(settings["driver"] ?? "") \(property.name)"] = given
            }
        }
        if !settings.has("port"), let port = settings["id"].flatMap({ usbPorts[$0] }) {
            settings.set("port", .string(port))
            fixed.append("port=\(port)")
        }
        if !settings.has("audiodev"), properties.contains(where: { $0.name == "audiodev" }) {
            // From QEMU 8.2 on a sound device without one is refused; before, it had the first that was given.
            let used = try await monitor.property("audiodev", of: path)?.string ?? ""
            let id = ids("audiodev").contains(used) ? used : "crossdock-audio"
            if !ids("audiodev").contains(id) { options.append(GuestOption("audiodev", "none,id=\(id)")) }
            settings.set("audiodev", .string(id))
            fixed.append("audiodev=\(id)\(id == used ? "" : ", which is heard nowhere")")
        }
        for name in ["addr", "mac", "num-queues", "num_queues", "host_mtu", "vectors", "events"]
        where !settings.has(name) {
            guard let value = try await monitor.property(name, of: path) else { continue }
            let text: String
            switch value {
            case .integer(let number):
                if name == "addr" ? number < 0 : number <= 0 || number >= 65535 { continue }
                // What QEMU chooses by the queues of a network; the others follow from what is given.
                if name == "vectors", !type.hasPrefix("virtio-net") { continue }
                // The default of what a guest may report of its end changed between versions.
                if name == "events", !type.hasPrefix("pvpanic") { continue }
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
}
