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
    /// The ports of USB devices by their ids: "2", or "1.2" behind a hub. QEMU tells of one that it chose only to people.
    func usbPorts() async throws -> [String: String] {
        let text: String
        do {
            text = try await execute("human-monitor-command", ["command-line": "info usb"]).string ?? ""
        } catch let error as QMPError where error.code == .refused { return [:] }
        var ports: [String: String] = [:]
        for line in text.split(whereSeparator: \.isNewline) {
            // Device 0.1, Port 1.2, Speed 480 Mb/s, Product QEMU USB Tablet, ID: tablet0
            guard let id = line.firstRange(of: ", ID: "), let port = line.firstRange(of: ", Port ") else { continue }
            ports[line[id.upperBound...].trimmed] = String(line[port.upperBound...].prefix { $0 != "," })
        }
        return ports
    }

    /// The types that other names of drivers mean: "virtio-net" to "virtio-net-pci". QEMU tells them only to people.
    func deviceAliases() async throws -> [String: String] {
        let text = try await execute("human-monitor-command", ["command-line": "device_add help"]).string ?? ""
        var aliases: [String: String] = [:]
        for line in text.split(whereSeparator: \.isNewline) {
            // name "virtio-net-pci", bus PCI, alias "virtio-net"
            let words = line.split(separator: "\"", omittingEmptySubsequences: false)
            guard words.count > 3, let place = words.firstIndex(where: { $0.hasSuffix("alias ") }),
                place + 1 < words.count
            else { continue }
            aliases[String(words[place + 1])] = String(words[1])
        }
        return aliases
    }

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
