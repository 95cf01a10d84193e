internal import IO
internal import TLS

extension GuestCommandLine {
    /// Rewrites the command line for a host.
    ///
    /// - Parameters:
    ///   - isAtHome: whether the guest is only started here, where it was described: its secrets and ports are right, and what
    ///     is not placed stays as it is written. Otherwise it is another host's, and every option is written anew.
    ///   - facts: the QEMU that shall read it; when nil, options stay in the form that they have.
    ///   - origin: what is known of the guest beyond its command line.
    ///   - place: gets every path with its kind, and says where it is on this host.
    /// - Returns: the command line. `-daemonize`, `-pidfile` and `-S` are left out, since the agent supervises QEMU.
    /// - Throws: `GuestError` naming an option that cannot be moved; also what `place` throws.
    public func relocated(
        isAtHome: Bool = false,
        for facts: EmulatorFacts? = nil,
        origin: Origin = Origin(),
        _ place: (PathReference) throws -> Placement
    ) throws -> Relocation {
        try withoutActuallyEscaping(place) { try relocated(isAtHome, facts, origin, $0) }
    }

    private func relocated(
        _ isAtHome: Bool,
        _ facts: EmulatorFacts?,
        _ origin: Origin,
        _ place: @escaping ParsedOption.Place
    ) throws -> Relocation {
        if !isAtHome { try checkTexts() }
        let options = isAtHome ? try options() : Self.monitorForms(try options())
        var nodes = try BlockNodeSet(options.filter { $0.name == "blockdev" }, isAtHome: isAtHome)
        if !isAtHome { try Self.checkAttachments(options, inner: nodes.inner) }
        try nodes.relocate(place)
        var result = Relocation(arguments: [program], changes: [], secrets: [])
        var definition = 0
        let monitors = isAtHome ? PublicMonitors() : PublicMonitors(options)
        for option in options {
            let new: [GuestOption]
            if monitors.include(option) {
                new = []
            } else if option.name == "blockdev" {
                new = nodes.text(definition).map { [GuestOption("blockdev", $0)] } ?? []
                definition += 1
            } else {
                var parsed = try ParsedOption(option, isAtHome: isAtHome, place)
                if let secret = parsed.carriedSecret {
                    result.secrets.append(secret)
                    new = []
                } else {
                    new = try Self.place(&parsed).compactMap { option in
                        guard let facts else { return option }
                        return try Self.adapted(option, to: facts, origin)
                    }
                }
            }
            result.arguments += GuestOption.words(new)
            if new != [option] {
                let before = GuestOption.words([option]).joined(separator: " ")
                let after = new.isEmpty ? "left out" : GuestOption.words(new).joined(separator: " ")
                result.changes.append("\(before): \(after)")
            }
        }
        return result
    }

    private static func place(_ option: inout ParsedOption) throws -> [GuestOption] {
        if !option.isAtHome { try option.rule.check(option) }
        switch try option.rule.relocate(&option) {
        case .written: return [option.written]
        case .leftOut: return []
        case .replaced(let options): return options
        }
    }

    /// QEMU's arguments end at a zero byte, and nobody reads a line of a log for two.
    private func checkTexts() throws {
        for word in arguments where !PeerText.isPlain(word) {
            let shown = String(
                word.unicodeScalars.prefix(80).map { PeerText.isPlain(String($0)) ? Character($0) : "?" }
            )
            throw GuestError("A guest with a control character in its command line cannot be moved: \(shown)")
        }
    }

    /// Devices are attached to disks, not to what lies under one: there it would be written behind the format's back.
    private static func checkAttachments(_ options: [GuestOption], inner: Set<String>) throws {
        for option in options where ["device", "machine", "M"].contains(option.name) {
            let settings = try BlockOptions(parsing: option.argument ?? "", implied: "driver")
            for key in ["drive", "pflash0", "pflash1"] {
                guard let node = settings[key], inner.contains(node) else { continue }
                throw GuestError(
                    "A guest with -\(option.name) \(option.argument ?? "") cannot be moved: '\(node)' is a part of another disk"
                )
            }
        }
    }

    /// Monitors that are not sockets of the guest's own: those of a management program, or open to others. On the other host nobody
    /// answers there, and nobody should.
    private struct PublicMonitors {
        /// Their character devices.
        private var devices: Set<String> = []
        /// Those of them that something else uses too.
        private var shared: Set<String> = []

        init() {}

        init(_ options: [GuestOption]) {
            var own: Set<String> = []
            for option in options where option.name == "chardev" {
                if let id = option.value("id", implied: "backend"), OptionRule.isPrivate(monitor: option) {
                    own.insert(id)
                }
            }
            devices = Set(options.compactMap(monitorDevice)).subtracting(own)
            if devices.isEmpty { return }
            for option in options where monitorDevice(option) == nil {
                if option.name == "device", let id = option.value("chardev") { shared.insert(id) }
                guard ["serial", "parallel", "debugcon"].contains(option.name), let argument = option.argument,
                    argument.hasPrefix("chardev:")
                else { continue }
                shared.insert(String(argument.dropFirst("chardev:".count)))
            }
        }

        func include(_ option: GuestOption) -> Bool {
            guard option.name == "chardev" else { return monitorDevice(option).map(devices.contains) ?? false }
            guard let id = option.value("id", implied: "backend") else { return false }
            return devices.contains(id) && !shared.contains(id)
        }
    }
}

extension ParsedOption {
    /// The id of a secret whose value travels outside of the command line: `-object secret,id=ID` and nothing more.
    fileprivate var carriedSecret: String? {
        guard name == "object", settings["qom-type"] == "secret", !settings.has("file"), !settings.has("data") else {
            return nil
        }
        return settings["id"]
    }
}
