internal import IO
internal import TLS

/// The same thing said to QEMUs of different versions.
extension GuestCommandLine {
    /// Monitors in the form that every version takes without a warning: `-mon` is deprecated from 11.1 on, which has objects in its
    /// place that older ones do not know.
    ///
    /// There such a monitor becomes an object with the name of its character device: when there is one of that name already, it
    /// stays as it is. So does one whose device has a longer name than the other form can have.
    static func monitorForms(_ options: [GuestOption]) -> [GuestOption] {
        let objects = Set(options.filter { $0.name == "object" }.compactMap { $0.value("id") })
        return options.map { option in
            let form = monitorForm(option)
            guard option.name == "mon", let device = monitorDevice(option) else { return form }
            return objects.contains(device) || device.utf8.count > longestMonitorDevice ? option : form
        }
    }

    /// QEMU cuts the name of a monitor's device after so many bytes (`-qmp chardev:ID`), and opens what has the rest for a name.
    private static let longestMonitorDevice = 31

    private static func monitorForm(_ option: GuestOption) -> GuestOption {
        let argument = option.argument ?? ""
        switch option.name {
        case "mon":
            guard let settings = try? BlockOptions(parsing: argument, implied: "chardev"),
                let device = settings["chardev"]
            else { return option }
            let isControl = settings["mode"] == "control"
            let name = isControl ? settings.isOn("pretty") ? "qmp-pretty" : "qmp" : "monitor"
            return GuestOption(name, "chardev:\(device)")
        case "object":
            guard let settings = try? BlockOptions(parsing: argument, implied: "qom-type"),
                let type = settings["qom-type"], ["monitor-qmp", "monitor-hmp"].contains(type),
                let device = settings["chardev"]
            else { return option }
            let name = type == "monitor-hmp" ? "monitor" : settings.isOn("pretty") ? "qmp-pretty" : "qmp"
            return GuestOption(name, "chardev:\(device)")
        default: return option
        }
    }

    /// The character device of a monitor; nil for an option that is none, or that makes its device itself.
    static func monitorDevice(_ option: GuestOption) -> String? {
        if option.name == "mon" {
            return option.value("chardev") ?? BlockOptions.first(option.argument ?? "")
        }
        // The debugger's stub takes a monitor's commands too.
        guard ["monitor", "qmp", "qmp-pretty", "gdb"].contains(option.name), let argument = option.argument,
            argument.hasPrefix("chardev:")
        else { return nil }
        return String(decoding: argument.dropFirst("chardev:".count).utf8.prefix(longestMonitorDevice), as: UTF8.self)
    }

    /// The types of devices that are given, each once; an offer may not ask for more than there can be.
    var deviceTypes: [String] {
        let types = ((try? options()) ?? []).filter { $0.name == "device" }.compactMap { $0.value("driver") }
        return Set(types.filter { $0.utf8.count <= 128 }).sorted().prefix(512).map { $0 }
    }

    /// The model of the processor as `-cpu` names it; nil when it is not given.
    public var processorModel: String? {
        let model = ((try? options()) ?? []).last { $0.name == "cpu" }.flatMap {
            KeyValue.split($0.argument ?? "").first
        }
        return model.flatMap { $0.utf8.count <= 128 ? $0 : nil }
    }

    /// An option as a QEMU of this host takes it.
    ///
    /// - Parameters:
    ///   - option: the option.
    ///   - facts: the QEMU.
    ///   - origin: what else is known of the guest.
    /// - Returns: the option; nil for one that is left out.
    /// - Throws: `GuestError` for what this QEMU does not have.
    static func adapted(_ option: GuestOption, to facts: EmulatorFacts, _ origin: Origin) throws -> GuestOption? {
        switch option.name {
        case "cpu": GuestOption("cpu", try processor(option.argument ?? "", facts, origin))
        case "chardev", "serial", "parallel", "debugcon", "monitor", "qmp", "qmp-pretty", "gdb", "netdev":
            reconnecting(option, facts)
        case "device": try device(option, facts, origin)
        // Flags that are gone, in the form that every QEMU takes; later ones of -machine are merged with the earlier.
        case "no-hpet": GuestOption("machine", "hpet=off")
        case "no-acpi": GuestOption("machine", "acpi=off")
        // How QEMU ends, and what a window looks like, on the host that it came from.
        case "async-teardown", "portrait", "rotate", "enable-fips", "alt-grab", "ctrl-grab": nil
        default: option
        }
    }

    /// What is known of a guest that its command line does not tell.
    public struct Origin: Sendable {
        /// Whether `-cpu` names all that the guest has, so that what it does not name must be off.
        public var hasFixedProcessor: Bool
        /// What devices, and the "processor", are given that they have anyway: "DRIVER property" to the value; nil when that is not
        /// known.
        public var standards: [String: String]?
        /// The version of the QEMU that it comes from.
        public var emulatorVersion: String

        /// Makes a description.
        public init(hasFixedProcessor: Bool = false, standards: [String: String]? = nil, emulatorVersion: String = "") {
            self.hasFixedProcessor = hasFixedProcessor
            self.standards = standards
            self.emulatorVersion = emulatorVersion
        }
    }

    /// A property that this QEMU does not know is left out when it has its default, or switches off what this QEMU does not have.
    private static func device(
        _ option: GuestOption,
        _ facts: EmulatorFacts,
        _ origin: Origin
    ) throws -> GuestOption {
        var settings = try BlockOptions(parsing: option.argument ?? "", implied: "driver")
        let driver = settings["driver"] ?? ""
        // Of an alias, or of a type that is missing, QEMU itself has the last word.
        guard let known = facts.devices[driver], !known.isEmpty else { return option }
        let names = Set(known.map(\.name)).union(["driver", "id", "bus", "addr", "failover_pair_id"])
        let given = settings.names(under: "")
        guard given.count <= 1024 else {
            throw GuestError(
                "A guest with a device of \(given.count) properties cannot be moved: the \(driver) has not as many"
            )
        }
        var isChanged = false
        for name in given where !names.contains(name) && !name.hasPrefix("legacy-") {
            guard let value = settings[name] else { continue }
            // What is newer than this QEMU is not there when it is off; what is older may have come to stay.
            let isNothing = BlockOptions.truth(value) == false && facts.isOlder(than: origin.emulatorVersion)
            guard origin.standards?["\(driver) \(name)"] == value || isNothing else {
                // An agent of an earlier release does not tell defaults; QEMU itself has the last word.
                if origin.standards == nil { continue }
                throw GuestError(
                    "The \(driver) '\(settings["id"] ?? "without an id")' has \(name)=\(value), which QEMU \(facts.version) on this host "
                        + "does not know; start the guest without it"
                )
            }
            settings.remove(name)
            isChanged = true
        }
        return isChanged ? GuestOption("device", settings.text) : option
    }

    /// What this QEMU does not know and the guest does not have is left out; what it has in the same model beyond what the guest
    /// has is switched off.
    private static func processor(_ argument: String, _ facts: EmulatorFacts, _ origin: Origin) throws -> String {
        var parts = KeyValue.split(argument)
        guard !facts.processor.isEmpty else { return argument }
        let known = Set(facts.processor.map(\.name))
        var named: Set<String> = []
        var unknown: [(name: String, value: String)] = []
        for (index, part) in parts.enumerated().dropFirst().reversed() {
            let name = GuestInspector.featureName(part)
            named.insert(name)
            if known.contains(name) { continue }
            parts.remove(at: index)
            let given = part.drop { $0 != "=" }.dropFirst()
            let value = part.hasPrefix("+") ? "on" : part.hasPrefix("-") ? "off" : String(given)
            let isNothing = BlockOptions.truth(value) == false || value == "0"
            if !isNothing, origin.standards?["processor \(name)"] != value { unknown.append((name, value)) }
        }
        guard unknown.isEmpty else {
            let list = unknown.reversed()
            throw GuestError(
                "The guest's processor has \(list.map { "\($0.name)=\($0.value)" }.joined(separator: ",")), which QEMU "
                    + "\(facts.version) on this host does not know; start the guest with "
                    + "\(list.map { "\($0.name)=off" }.joined(separator: ",")) in -cpu, or with a processor model that both QEMUs have "
                    + "in full"
            )
        }
        if origin.hasFixedProcessor {
            for property in facts.processor.sorted(by: { $0.name < $1.name })
            where property.isFeature && !named.contains(property.name) {
                parts.append("\(property.name)=off")
            }
        }
        return parts.map(KeyValue.escape).joined(separator: ",")
    }

    /// The delay after which a socket connects again, in the unit that this QEMU takes: seconds until QEMU 10, milliseconds from
    /// 9.2 on.
    private static func reconnecting(_ option: GuestOption, _ facts: EmulatorFacts) -> GuestOption {
        guard let argument = option.argument, argument.contains("reconnect") else { return option }
        if argument.hasPrefix("{") { return reconnectingJSON(option, argument, facts) }
        let parts = KeyValue.split(argument).map { part -> String in
            if part.hasPrefix("reconnect-ms="), !facts.hasReconnectMilliseconds, let delay = UInt64(part.dropFirst(13))
            {
                return "reconnect=\(delay / 1000 + (delay % 1000 > 0 ? 1 : 0))"
            }
            if part.hasPrefix("reconnect="), !facts.hasReconnectSeconds, let delay = UInt64(part.dropFirst(10)),
                delay < 1 << 32
            {
                return "reconnect-ms=\(delay * 1000)"
            }
            return part
        }
        return GuestOption(option.name, parts.map(KeyValue.escape).joined(separator: ","))
    }

    private static func reconnectingJSON(_ option: GuestOption, _ argument: String, _ facts: EmulatorFacts)
        -> GuestOption
    {
        guard case .object(var members)? = try? JSONValue(parsing: Array(argument.utf8)) else { return option }
        if case .integer(let delay)? = members["reconnect-ms"], !facts.hasReconnectMilliseconds, delay >= 0 {
            members["reconnect-ms"] = nil
            members["reconnect"] = .integer(delay / 1000 + (delay % 1000 > 0 ? 1 : 0))
        } else if case .integer(let delay)? = members["reconnect"], !facts.hasReconnectSeconds,
            (0..<1 << 32).contains(delay)
        {
            members["reconnect"] = nil
            members["reconnect-ms"] = .integer(delay * 1000)
        }
        return GuestOption(option.name, JSONValue.object(members).text)
    }
}
