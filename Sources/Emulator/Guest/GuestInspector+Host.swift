internal import TLS

extension GuestInspector {
    mutating func freeze() async throws {
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
}
