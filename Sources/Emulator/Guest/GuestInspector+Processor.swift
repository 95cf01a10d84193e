internal import IO

extension GuestInspector {
    /// What a model is follows the version of QEMU and, for `host` and `max`, the host: it becomes the list of what the guest has.
    ///
    /// Features that are off are named too, since the other QEMU may have them in the same model.
    mutating func freezeProcessor() async throws {
        guard !result.processor.isEmpty, let path = try await monitor.firstProcessor(),
            let type = try await monitor.property("type", of: path)?.string
        else { return }
        let given = options.last { $0.name == "cpu" }?.argument
        let topology = try await monitor.property("smp", of: "/machine")?.object.mapValues(\.text) ?? [:]
        let implied = ProcessorSetting.sharesPackage(topology) ? ProcessorSetting.followTopology : []
        let settings = try await monitor.processorSettings().filter { !implied.contains($0.property.name) }
        var parts = [result.processor]
        // What else was asked for, such as Hyper-V's, stands as it was given.
        let measured = Set(settings.filter(Self.isFixed).map(\.property.name))
        for part in KeyValue.split(given ?? "").dropFirst() {
            let name = Self.featureName(part)
            if !measured.contains(name), !name.hasPrefix("host-phys-bits") { parts.append(part) }
        }
        let count = parts.count
        for setting in settings.sorted(by: { $0.property.name < $1.property.name }) where Self.isFixed(setting) {
            let value: String
            switch setting.value {
            case .bool(let flag): value = flag ? "on" : "off"
            // A number without a default that is zero is not there.
            case .integer(let number) where number != 0 || setting.property.standard != nil: value = "\(number)"
            case .string(let text) where !text.isEmpty: value = text
            default: continue
            }
            parts.append("\(setting.property.name)=\(value)")
            if setting.property.standard != nil,
                try await machineDefaults().give(setting.value, to: setting.property, ofAny: [type])
            {
                result.standards["processor \(setting.property.name)"] = value
            }
        }
        result.isProcessorFixed = settings.contains { $0.property.isFeature }
        // The number of address bits is given above.
        if try await monitor.property("host-phys-bits", of: path)?.bool == true {
            parts.append("host-phys-bits=off")
        }
        replace(
            "cpu",
            with: parts.map(KeyValue.escape).joined(separator: ","),
            shown: "\(result.processor) with \(parts.count - count) properties as they are now"
        )
    }

    /// Whether a setting is one that the guest sees, and that can be given.
    private static func isFixed(_ setting: ProcessorSetting) -> Bool {
        let name = setting.property.name
        if setting.property.isInternal || name.hasPrefix("hv-") { return false }
        // These stand as they were given.
        return !["kvm", "tcg-cpuid", "host-cache-info"].contains(name)
    }

    /// The property that a part of `-cpu` is about: "avx" of `+avx` and of `avx=on`.
    static func featureName(_ part: String) -> String {
        let bare = part.hasPrefix("+") || part.hasPrefix("-") ? part.dropFirst() : part[...]
        return String(bare.prefix { $0 != "=" }).replacing("_", with: "-")
    }
}
