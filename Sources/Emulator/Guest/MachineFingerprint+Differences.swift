extension MachineFingerprint {
    /// How another machine differs, a sentence each with what to do about it; empty when a guest could not tell them apart.
    ///
    /// The two QEMUs may be of different versions. What both know of must be equal, but for what a device reports of itself at
    /// run time. What only one of them knows of was not given by the guest's description, or the other one could not have been
    /// started with it; its value is the machine type's, whose version is there to mean what it meant before. Only a processor
    /// feature is another matter: models and `max` follow the QEMU that reads them, so one that is on at one side must be known
    /// and on at the other.
    ///
    /// - Parameter other: the machine on the other host.
    public func differences(from other: MachineFingerprint) -> [String] {
        var reasons: [String] = []
        if machine != other.machine {
            reasons.append("The machine is \(machine) here and \(other.machine) there; \(Self.lookThere)")
        }
        if memory != other.memory {
            reasons.append(
                "The guest has \(memory >> 20) MiB of memory here and \(other.memory >> 20) MiB there; \(Self.lookThere)"
            )
        }
        if processors != other.processors {
            reasons.append(
                "The guest has \(processors) processors here and \(other.processors) there; \(Self.lookThere)"
            )
        }
        // A level that a QEMU does not know has one of its kind.
        reasons += Self.compare(topology, other.topology, missing: "1").map { name, here, there in
            "The guest's processors have \(name)=\(here) here and \(there) there; give all of -smp, or \(Self.lookThere)"
        }
        reasons += processorDifferences(from: other)
        if let here = hostCaches, let there = other.hostCaches, here != there {
            reasons.append(
                "The guest sees the caches of its host, which are \(here) here and \(there) there; start it with "
                    + "host-cache-info=off in -cpu"
            )
        }
        reasons += deviceDifferences(from: other)
        return reasons
    }

    private static let lookThere =
        "look for what changes QEMU's options on that host: a wrapper around QEMU, a configuration file, another build"

    private static func compare(
        _ here: [String: String],
        _ there: [String: String],
        missing: String
    ) -> [(name: String, here: String, there: String)] {
        Set(here.keys).union(there.keys).sorted().compactMap { key in
            let (a, b) = (here[key] ?? missing, there[key] ?? missing)
            return a == b ? nil : (key, a, b)
        }
    }

    // MARK: processors

    /// Those of the differences that are features of the processor.
    ///
    /// - Parameter other: the machine on the other host.
    public func processorDifferences(from other: MachineFingerprint) -> [String] {
        // An agent that does not say which of them are knobs lists some that tell nothing.
        let isTold = !standards.isEmpty && !other.standards.isEmpty
        let implied = ProcessorSetting.sharesPackage(topology) ? ProcessorSetting.followTopology : []
        return Set(processor.keys).union(other.processor.keys).sorted().compactMap { name -> String? in
            let (here, there) = (processor[name], other.processor[name])
            guard here != there, !ProcessorSetting.hostSide.contains(name), !implied.contains(name) else { return nil }
            let key = "processor \(name)"
            // What is not listed cannot be given, and a feature can.
            func isKnob(_ side: MachineFingerprint) -> Bool { side.standards[key] != nil || side.kinds[key] == nil }
            if here == nil || there == nil {
                // Off, and none of it, is what it is for a QEMU that never heard of it.
                let known = here ?? there ?? ""
                guard isTold, !isKnob(here == nil ? other : self), !["false", "0", ""].contains(known) else {
                    return nil
                }
            }
            let remedy =
                "start the guest with \(name)=off in -cpu, or with a processor model that both QEMUs have in full"
            return switch (here, there) {
            case ("true", "false"): "The processor feature '\(name)' is on here and off there; \(remedy)"
            case ("false", "true"): "The processor feature '\(name)' is off here and on there; \(Self.lookThere)"
            case ("true", nil): "The processor feature '\(name)' is on here and not known to QEMU there; \(remedy)"
            case (nil, "true"):
                "The processor feature '\(name)' is not known to QEMU here and on there; \(Self.lookThere)"
            default:
                "The processor's '\(name)' is \(here ?? "missing") here and \(there ?? "missing") there; give it in -cpu, or "
                    + "\(Self.lookThere)"
            }
        }
    }

    // MARK: devices

    private func deviceDifferences(from other: MachineFingerprint) -> [String] {
        var reasons: [String] = []
        if !builtIn.isEmpty, !other.builtIn.isEmpty {
            for type in Set(builtIn.keys).union(other.builtIn.keys).sorted() {
                let (here, there) = (builtIn[type] ?? 0, other.builtIn[type] ?? 0)
                // A processor that was plugged in is elsewhere, and they are counted and compared by themselves.
                if here == there || type.hasSuffix("-cpu") { continue }
                reasons.append(
                    "There are \(here) built-in devices of type \(type) here and \(there) there; \(Self.lookThere)"
                )
            }
        }
        var changed: Set<String> = []
        reasons += Set(devices.keys).union(other.devices.keys).sorted().compactMap { path in
            let (here, there) = (devices[path], other.devices[path])
            // What the machine has by itself was compared above, wherever it is.
            let isBuiltIn = !path.hasPrefix("/machine/peripheral")
            guard here != there, !isBuiltIn || builtIn.isEmpty || other.builtIn.isEmpty else { return nil }
            changed.insert(path)
            // What is inside of a device comes and goes with it.
            let parent = path.split(separator: "/").dropLast().joined(separator: "/")
            if changed.contains("/\(parent)") { return nil }
            if path.hasPrefix("unattached ") {
                let type = path.dropFirst("unattached ".count)
                return "There are \(here ?? "0") built-in devices of type \(type) here and \(there ?? "0") there"
            }
            return switch (here, there) {
            case (nil, let there?):
                "The device \(Self.short(path)) (\(there)) is there and not here; \(Self.lookThere)"
            case (let here?, nil): "The device \(Self.short(path)) (\(here)) is here and not there; \(Self.lookThere)"
            default:
                "The device \(Self.short(path)) is a \(here ?? "") here and a \(there ?? "") there; \(Self.lookThere)"
            }
        }
        for (id, here) in usbPorts.sorted(by: { $0.key < $1.key }) {
            guard let there = other.usbPorts[id], here != there, !changed.contains("/machine/peripheral/\(id)") else {
                continue
            }
            reasons.append(
                "The USB device '\(id)' is in port \(here) here and \(there) there; give port in its -device, or \(Self.lookThere)"
            )
        }
        reasons += Set(settings.keys).intersection(other.settings.keys).sorted().compactMap { key in
            settingDifference(key, other, changed)
        }
        return reasons
    }

    private func settingDifference(_ key: String, _ other: MachineFingerprint, _ changed: Set<String>) -> String? {
        let path = String(key.prefix { $0 != " " })
        guard let here = settings[key], let there = other.settings[key], here != there, !changed.contains(path) else {
            return nil
        }
        let name = String(key.dropFirst(path.count + 1))
        // A port that QEMU chose is empty here; which one it is was compared above.
        if name == "port", here == "\"\"" || there == "\"\"" { return nil }
        let type = devices[path] ?? ""
        let hereProperty = property(name, of: type)
        let thereProperty = other.property(name, of: type)
        if let hereProperty, let thereProperty {
            // A statistic of a driver, what firmware assigned: what the guest was doing, not what it is.
            guard hereProperty.isConfiguration || thereProperty.isConfiguration else { return nil }
            // The same default, written in another way since.
            if hereProperty.type != thereProperty.type, here == standards["\(type) \(name)"],
                there == other.standards["\(type) \(name)"]
            {
                return nil
            }
        }
        func shown(_ text: String) -> String {
            name == "addr" && GuestInspector.isPCIAddress(hereProperty?.type)
                ? Int64(text).map(GuestInspector.address) ?? text : text
        }
        return
            "The \(type) \(Self.short(path)) has \(name)=\(shown(here)) here and \(shown(there)) there; give \(name) in its "
            + "-device, or \(Self.lookThere)"
    }

    private func property(_ name: String, of type: String) -> DeviceProperty? {
        let key = "\(type) \(name)"
        guard let kind = kinds[key] else { return nil }
        return DeviceProperty(name: name, type: kind, standard: standards[key].map { .string($0) })
    }

    private static func short(_ path: String) -> String {
        for prefix in ["/machine/peripheral/", "/machine/peripheral-anon/", "/machine/"] where path.hasPrefix(prefix) {
            return "'\(path.dropFirst(prefix.count))'"
        }
        return "'\(path)'"
    }
}
