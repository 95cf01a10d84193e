internal import TLS

/// The same thing said to QEMUs of different versions.
extension GuestCommandLine {
    /// Monitors in the form that every version takes without a warning: `-mon` is deprecated from 11.1 on, which has objects in its
    /// place that older ones do not know.
    static func monitorForm(_ option: GuestOption) -> GuestOption {
        let argument = option.argument ?? ""
        switch option.name {
        case "mon":
            guard let settings = try? BlockOptions(parsing: argument, implied: "chardev"), let device = settings["chardev"]
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
        guard ["monitor", "qmp", "qmp-pretty"].contains(option.name), let argument = option.argument,
            argument.hasPrefix("chardev:")
        else { return nil }
        return String(argument.dropFirst("chardev:".count))
    }

    /// The model of the processor as `-cpu` names it; nil when it is not given.
    public var processorModel: String? {
        ((try? options()) ?? []).last { $0.name == "cpu" }.flatMap { KeyValue.split($0.argument ?? "").first }
    }

    /// An option as a QEMU of this host takes it.
    ///
    /// - Parameters:
    ///   - option: the option.
    ///   - facts: the QEMU.
    ///   - isFixed: whether `-cpu` names all that the guest has, so that what it does not name must be off.
    /// - Throws: `GuestError` for what this QEMU does not have.
    static func adapted(_ option: GuestOption, to facts: EmulatorFacts, fixed isFixed: Bool) throws -> GuestOption {
        switch option.name {
        case "cpu": GuestOption("cpu", try processor(option.argument ?? "", facts, isFixed))
        case "chardev", "serial", "parallel", "debugcon", "monitor", "qmp", "qmp-pretty", "gdb", "netdev":
            reconnecting(option, facts)
        default: option
        }
    }

    /// What this QEMU does not know and the guest does not have is left out; what it has in the same model beyond what the guest
    /// has is switched off.
    private static func processor(_ argument: String, _ facts: EmulatorFacts, _ isFixed: Bool) throws -> String {
        var parts = KeyValue.split(argument)
        guard !facts.processor.isEmpty else { return argument }
        let known = Set(facts.processor.map(\.name))
        var named: Set<String> = []
        try parts = [parts[0]]
            + parts.dropFirst().filter { part in
                let name = GuestInspector.featureName(part)
                named.insert(name)
                if known.contains(name) { return true }
                let value = part.hasPrefix("+") ? "on" : part.hasPrefix("-") ? "off" : part.drop { $0 != "=" }.dropFirst()
                if BlockOptions.truth(value) == false || value == "0" { return false }
                throw GuestError(
                    "The guest's processor has \(name)=\(value), which QEMU \(facts.version) on this host does not know; start the "
                        + "guest with \(name)=off in -cpu, or with a processor model that both QEMUs have in full"
                )
            }
        if isFixed {
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
        guard let argument = option.argument, argument.contains("reconnect"), !argument.hasPrefix("{") else { return option }
        let parts = KeyValue.split(argument).map { part -> String in
            if part.hasPrefix("reconnect-ms="), !facts.hasReconnectMilliseconds, let delay = UInt64(part.dropFirst(13)) {
                return "reconnect=\(delay / 1000 + (delay % 1000 > 0 ? 1 : 0))"
            }
            if part.hasPrefix("reconnect="), !facts.hasReconnectSeconds, let delay = UInt64(part.dropFirst(10)), delay < 1 << 32 {
                return "reconnect-ms=\(delay * 1000)"
            }
            return part
        }
        return GuestOption(option.name, parts.map(KeyValue.escape).joined(separator: ","))
    }
}
