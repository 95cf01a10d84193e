/// A property of a guest's processor with the value that it has now.
struct ProcessorSetting: Sendable {
    /// The property.
    var property: DeviceProperty
    /// What it is.
    var value: JSONValue

    /// Properties that say how QEMU is to go about it or what became of it, not what the guest sees.
    static let hostSide: Set<String> = [
        "check", "enforce", "migratable", "host-phys-bits", "host-phys-bits-limit", "start-powered-off", "hotplugged",
        "hotpluggable", "realized", "crash-information", "memory", "type", "parent_bus", "filtered-features",
        "unavailable-features", "feature-words",
    ]

    /// Features that say that there are several processors in a package. Where there are, the guest reads them as set, whatever
    /// the property says: QEMU 7.2 adds them when the guest asks, 10.0 when the processor is made.
    static let followTopology: Set<String> = ["ht", "cmp-legacy"]

    /// Whether a package has several processors.
    ///
    /// - Parameter topology: the machine's `smp`; a level that is missing has one of its kind.
    static func sharesPackage(_ topology: [String: String]) -> Bool {
        ["dies", "clusters", "modules", "cores", "threads"].contains { (topology[$0].flatMap { Int($0) } ?? 1) > 1 }
    }
}

extension QMPClient {
    /// What the first processor is set to, without what tells of one processor only, or of this host.
    func processorSettings() async throws -> [ProcessorSetting] {
        guard let path = try await firstProcessor(), let type = try await property("type", of: path)?.string else {
            return []
        }
        var settings: [ProcessorSetting] = []
        let wanted = try await deviceProperties(type).filter { property in
            // Second names of other properties have an underscore where these have a dash.
            !property.isReference && !property.name.contains("_")
                && !ProcessorSetting.hostSide.contains(property.name)
        }
        let values = try await processorProperties(wanted.map(\.name), of: path)
        for property in wanted {
            guard let value = values[property.name] else { continue }
            switch value {
            case .bool, .string: settings.append(ProcessorSetting(property: property, value: value))
            case .integer:
                // Which one of several it is.
                if property.name.hasSuffix("-id") { continue }
                settings.append(ProcessorSetting(property: property, value: value))
            // Lists tell the same in another way, and a number beyond 2^63 is QEMU's for "not set".
            default: continue
            }
        }
        return settings
    }
}
