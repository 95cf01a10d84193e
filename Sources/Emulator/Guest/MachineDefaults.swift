/// What a machine type sets of devices that an older QEMU made otherwise: with it a property has the value that it had, or that
/// was meant before there was the property.
///
/// A value that comes from here need not be written down, and an older QEMU could not read it.
struct MachineDefaults {
    private var values: [String: String] = [:]
    private var parents: [String: String] = [:]

    /// Reads those of a machine type (`query-machines` with `compat-props`, from QEMU 9.1 on). None for an older QEMU, which cannot
    /// tell.
    init(of machine: String, _ monitor: QMPClient) async throws {
        do {
            let machines = try await monitor.execute("query-machines", ["compat-props": true]).array
            for item in machines.first(where: { $0["name"]?.string == machine })?["compat-props"]?.array ?? [] {
                guard let type = item["qom-type"]?.string, let name = item["property"]?.string else { continue }
                // Newer ones come first, and the oldest has the last word.
                values["\(type) \(name)"] = item["value"]?.string
            }
        } catch let error as QMPError where error.code == .refused { return }
        for type in try await monitor.execute("qom-list-types", ["abstract": true]).array {
            if let name = type["name"]?.string { parents[name] = type["parent"]?.string }
        }
    }

    /// Whether a value is what a device has without being given it: what the machine type sets, or the default of its type.
    ///
    /// - Parameters:
    ///   - value: what a device has.
    ///   - property: the property.
    ///   - types: the device's type and those of the devices that it consists of, whose properties it shows as its own.
    func give(_ value: JSONValue, to property: DeviceProperty, ofAny types: [String]) -> Bool {
        for type in types {
            var current: String? = type
            while let type = current {
                if let given = values["\(type) \(property.name)"] { return Self.means(given, value) }
                current = parents[type]
            }
        }
        return value == property.standard
    }

    /// Whether a text, as it stands in QEMU's tables, means a value.
    static func means(_ text: String, _ value: JSONValue) -> Bool {
        switch value {
        case .bool(let flag): (BlockOptions.truth(text) ?? !flag) == flag
        case .integer(let number):
            text.hasPrefix("0x") ? Int64(text.dropFirst(2), radix: 16) == number : Int64(text) == number
        case .string(let string): text == string
        default: false
        }
    }
}
