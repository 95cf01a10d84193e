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
    private mutating func freezeDevice(_ index: Int, _ settings: BlockOptions, _ path: String) async throws {
        var settings = settings
        var fixed: [String] = []
        // Memory modules have an address of another kind.
        let isPCI = try await monitor.deviceProperties(settings["driver"] ?? "").contains {
            $0.name == "addr" && Self.isPCIAddress($0.type)
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
}
