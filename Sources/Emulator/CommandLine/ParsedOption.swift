internal import IO

/// An option that was read by its rule, with what places it on a host.
public struct ParsedOption {
    typealias Place = (GuestCommandLine.PathReference) throws -> GuestCommandLine.Placement

    let option: GuestOption
    let rule: OptionRule
    /// What its argument says, when it is a list of settings; empty otherwise.
    var settings: BlockOptions
    /// Whether it stays on the host where it was given: then it is written as its owner wrote it.
    let isAtHome: Bool
    private let placer: Place
    private var isChanged = false

    var name: String { option.name }
    var argument: String { option.argument ?? "" }

    /// Reads an option.
    ///
    /// - Throws: `GuestError` for an option that cannot be moved; for one of another host also when it is not known, or could be read
    ///   in two ways.
    init(_ option: GuestOption, isAtHome: Bool, _ place: @escaping Place) throws {
        self.option = option
        self.isAtHome = isAtHome
        placer = place
        guard let rule = OptionRule.of(option.name) ?? (isAtHome ? OptionRule(option.name) : nil) else {
            throw GuestError("A guest with -\(option.name) cannot be moved: \(OptionRule.unknown)")
        }
        self.rule = rule
        settings = try BlockOptions(parsing: "")
        switch rule.owner {
        case .nobody(let reason): throw GuestError("A guest with -\(option.name) cannot be moved: \(reason)")
        case .own(let reason) where !isAtHome:
            throw GuestError("A guest with -\(option.name) cannot be moved: \(reason)")
        default: break
        }
        guard case .settings(let implied, let isJSON) = rule.argument else { return }
        settings = try BlockOptions(parsing: argument, implied: implied)
        if isAtHome { return }
        if settings.isJSON, !isJSON { throw refusal("it is not known in JSON") }
        if let reason = settings.ambiguity(repeatable: rule.repeatable) { throw refusal(reason) }
        for key in ["id", "node-name"] {
            if let id = settings[key], !PeerText.isIdentifier(id) {
                throw refusal("'\(id)' is no id: a letter, then letters, digits, '-', '.' and '_'")
            }
        }
    }

    /// Reads an option of a guest whose blank copy is made.
    init(ofOriginal option: GuestOption) throws {
        self.option = option
        isAtHome = true
        placer = { GuestCommandLine.Placement(path: $0.path) }
        let rule = OptionRule.of(option.name) ?? OptionRule(option.name)
        self.rule = rule
        if case .settings(let implied, _) = rule.argument {
            settings = try BlockOptions(parsing: option.argument ?? "", implied: implied)
        } else {
            settings = try BlockOptions(parsing: "")
        }
    }

    func refusal(_ reason: String) -> GuestError {
        GuestError("A guest with -\(name) \(argument) cannot be moved: \(reason)")
    }

    /// Refuses every key but these, and what is under them.
    func allow(_ keys: Set<String>) throws {
        for leaf in settings.leaves {
            let isKnown =
                keys.contains(leaf.key)
                || keys.contains(String(leaf.key.prefix { $0 != "." })) && leaf.key.contains(".")
            guard isKnown else { throw refusal("'\(leaf.key)' is not known to be harmless") }
        }
    }

    /// Where a path is on this host.
    func placement(
        _ kind: GuestCommandLine.PathKind,
        _ path: String,
        format: String? = nil
    ) throws -> GuestCommandLine.Placement {
        try placer(.init(kind: kind, path: path, option: "-\(name)", format: format))
    }

    /// The text of the argument with a path placed.
    func placedText(_ kind: GuestCommandLine.PathKind) throws -> OptionRule.Relocation {
        .replaced([GuestOption(name, try placement(kind, argument).path)])
    }

    /// Places the values of keys.
    mutating func place(_ kind: GuestCommandLine.PathKind, keys: String...) throws {
        for key in keys {
            guard let value = settings[key] else { continue }
            set(key, try placement(kind, value).path)
        }
    }

    /// Sets a key.
    mutating func set(_ key: String, _ value: String) {
        if settings[key] == value { return }
        settings.set(key, .string(value))
        isChanged = true
    }

    /// Removes a key.
    mutating func remove(_ key: String) { if settings.has(key) { change { $0.remove(key) } } }

    /// Changes the settings.
    mutating func change(_ body: (inout BlockOptions) throws -> Void) rethrows {
        try body(&settings)
        isChanged = true
    }

    /// As it is written for QEMU.
    var written: GuestOption {
        guard case .settings = rule.argument, !isAtHome || isChanged else { return option }
        return GuestOption(name, settings.text)
    }
}
