/// A property of a type of devices, as QEMU tells of it (`device-list-properties`).
///
/// QEMU gives a default to each number and flag that can be set when a device is made. A number or flag without one is
/// something that the device reports (a statistic, what firmware assigned), or one of a processor's features.
struct DeviceProperty: Sendable, Hashable {
    /// Its name.
    var name: String
    /// Its type in QEMU's words: "bool", "uint32", "str", "link<memory-region>".
    var type: String
    /// Its default; nil when it has none. What the machine type changes is not in it: see `MachineDefaults`.
    var standard: JSONValue?

    /// Whether it is text that can be set.
    var isText: Bool { ["str", "string"].contains(type) }
    /// Whether it leads to another object.
    var isReference: Bool { type.hasPrefix("link<") || type.hasPrefix("child<") }
    /// Whether it is what the device was made with. The order of boot devices has no default, but is.
    var isConfiguration: Bool { !isReference && (standard != nil || isText || name == "bootindex") }
    /// Whether it is a feature of a processor, with one name of several: a bit that the guest reads with CPUID or from a register.
    var isFeature: Bool {
        type == "bool" && standard == nil && !name.contains("_") && !isInternal
            && !ProcessorSetting.hostSide.contains(name)
    }
    /// Whether it is internal to QEMU: kept by the machine type, and for nobody to set.
    var isInternal: Bool { name.hasPrefix("x-") }
}

extension QMPClient {
    /// The properties of a type of devices; empty when QEMU does not have the type.
    func deviceProperties(_ type: String) async throws -> [DeviceProperty] {
        do {
            return try await execute("device-list-properties", ["typename": .string(type)]).array.compactMap { item in
                guard let name = item["name"]?.string, let kind = item["type"]?.string else { return nil }
                return DeviceProperty(name: name, type: kind, standard: item["default-value"])
            }
        } catch let error as QMPError where error.code == .refused { return [] }
    }
}
