internal import IO

/// The options of a drive or a block node, in either of QEMU's two forms: `key=value,...` or JSON.
///
/// Keys are dotted paths: `file.filename`. The form is kept, since QEMU reads "on" in one and `true` in the other.
struct BlockOptions {
    private var pairs: [(key: String, value: String)] = []
    private var json: JSONValue?
    /// The key that the first part does not have in the text.
    private var implied: String?

    /// Parses an argument of `-drive`, `-blockdev`, `-device` or the like.
    ///
    /// - Parameters:
    ///   - text: the argument.
    ///   - implied: the key of a first part that has none, as `driver` for `-device`.
    init(parsing text: String, implied: String? = nil) throws {
        if text.hasPrefix("{") {
            guard let value = try? JSONValue(parsing: Array(text.utf8)), case .object = value else {
                throw GuestError("'\(text)' is not a JSON object")
            }
            json = value
            return
        }
        for (index, part) in KeyValue.split(text).enumerated() where !part.isEmpty {
            if let equals = part.firstIndex(of: "=") {
                pairs.append((String(part[..<equals]), String(part[part.index(after: equals)...])))
            } else if index == 0, let implied {
                self.implied = implied
                pairs.append((implied, part))
            } else {
                // `readonly` means `readonly=on`, and `noreadonly` its opposite, with any key but one that begins so itself.
                let isNegative = part.hasPrefix("no") && part != "nodelay" && part != "node-name"
                pairs.append((isNegative ? String(part.dropFirst(2)) : part, isNegative ? "off" : "on"))
            }
        }
    }

    /// Whether it is in the form of JSON.
    var isJSON: Bool { json != nil }

    /// Why QEMU could read it otherwise than it is read here; nil when it could not.
    ///
    /// - Parameter repeatable: keys that may be given several times, with a meaning for each.
    func ambiguity(repeatable: Set<String> = []) -> String? {
        if let json { return Self.ambiguity(in: json, depth: 0) }
        guard pairs.count <= 4096 else { return "it has \(pairs.count) keys" }
        var seen: Set<String> = []
        for (key, _) in pairs {
            guard PeerText.isKey(key) else { return "'\(key.prefix(64))' is no key of an option" }
            if !seen.insert(key).inserted, !repeatable.contains(key) { return "'\(key)' is given twice" }
            // A value, and a set of values, under one key.
            if let dot = key.lastIndex(of: "."), key.split(separator: ".").count > Self.deepest {
                return "'\(key[..<dot].prefix(64))' is too deep"
            }
        }
        return nil
    }

    /// How deep nodes may lie within each other.
    private static let deepest = 24

    private static func ambiguity(in value: JSONValue, depth: Int) -> String? {
        guard depth <= deepest else { return "it is too deep" }
        for key in value.object.keys where !PeerText.isKey(key) || key.contains(".") {
            return "'\(key.prefix(64))' is no key of an option"
        }
        for member in value.object.values { if let found = ambiguity(in: member, depth: depth + 1) { return found } }
        for member in value.array { if let found = ambiguity(in: member, depth: depth + 1) { return found } }
        return nil
    }

    /// An empty set in the form of a JSON object.
    init(_ members: [String: JSONValue]) { json = .object(members) }

    /// The argument's text.
    var text: String {
        if let json { return json.text }
        return pairs.enumerated().map { index, pair in
            // Without its key a value is not unescaped everywhere.
            index == 0 && pair.key == implied && !pair.value.isEmpty && !pair.value.contains { $0 == "," || $0 == "=" }
                ? pair.value : "\(pair.key)=\(KeyValue.escape(pair.value))"
        }.joined(separator: ",")
    }

    /// The value of a key as text: "on" and "off" for truth values; nil when it is not there or an object.
    subscript(key: String) -> String? {
        guard let json else { return pairs.last { $0.key == key }?.value }
        var value: JSONValue? = json
        for part in key.split(separator: ".") { value = value?[String(part)] }
        return switch value {
        case .string(let text): text
        case .bool(let flag): flag ? "on" : "off"
        case .integer(let number): "\(number)"
        default: nil
        }
    }

    /// Whether a truth value is set.
    func isOn(_ key: String) -> Bool { Self.truth(self[key] ?? "off") ?? false }

    /// What a text means as a truth value, in each way in which QEMU takes one; nil for any other text.
    static func truth(_ text: some StringProtocol) -> Bool? {
        if ["on", "yes", "true", "y"].contains(text) { return true }
        return ["off", "no", "false", "n"].contains(text) ? false : nil
    }

    /// Whether there is anything under a key, a value or an object.
    func has(_ key: String) -> Bool {
        guard let json else { return pairs.contains { $0.key == key || $0.key.hasPrefix("\(key).") } }
        var value: JSONValue? = json
        for part in key.split(separator: ".") { value = value?[String(part)] }
        return value != nil && value != .null
    }

    /// The names directly under a key; "" for the outermost.
    func names(under key: String) -> [String] {
        if let json {
            var value: JSONValue? = json
            for part in key.split(separator: ".") { value = value?[String(part)] }
            return value.map { Array($0.object.keys).sorted() } ?? []
        }
        let prefix = key.isEmpty ? "" : "\(key)."
        var found: [String] = []
        var seen: Set<String> = []
        for pair in pairs where pair.key.hasPrefix(prefix) {
            let name = String(pair.key.dropFirst(prefix.count).prefix { $0 != "." })
            if seen.insert(name).inserted { found.append(name) }
        }
        return found
    }

    /// Every value with its whole key, in the order in which they are given; a key may be there twice.
    var leaves: [(key: String, value: String)] {
        guard let json else { return pairs }
        return Self.leaves(in: json, "")
    }

    private static func leaves(in value: JSONValue, _ prefix: String) -> [(key: String, value: String)] {
        let key = String(prefix.dropLast())
        return switch value {
        case .object(let members):
            members.sorted { $0.key < $1.key }.flatMap { leaves(in: $0.value, "\(prefix)\($0.key).") }
        case .array(let items): items.enumerated().flatMap { leaves(in: $0.element, "\(prefix)\($0.offset).") }
        case .string(let text): [(key, text)]
        case .bool(let flag): [(key, flag ? "on" : "off")]
        case .integer(let number): [(key, "\(number)")]
        case .number(let number): [(key, "\(number)")]
        case .null: [(key, "")]
        }
    }

    /// Where a name occurs, at any depth: "" or "file." or "file.file.".
    func prefixes(of name: String) -> [String] {
        if let json { return Self.prefixes(of: name, in: json, "") }
        return pairs.compactMap { pair in
            pair.key == name ? "" : pair.key.hasSuffix(".\(name)") ? String(pair.key.dropLast(name.count)) : nil
        }
    }

    private static func prefixes(of name: String, in value: JSONValue, _ prefix: String) -> [String] {
        var found: [String] = []
        for (key, member) in value.object {
            if key == name, member.string != nil { found.append(prefix) }
            found += prefixes(of: name, in: member, "\(prefix)\(key).")
        }
        for (index, member) in value.array.enumerated() {
            found += prefixes(of: name, in: member, "\(prefix)\(index).")
        }
        return found
    }

    /// Sets a key, wherever it is.
    mutating func set(_ key: String, _ value: JSONValue) {
        if let json {
            self.json = Self.setting(json, key.split(separator: ".")[...], value)
            return
        }
        let text =
            switch value {
            case .string(let text): text
            case .bool(let flag): flag ? "on" : "off"
            default: value.text
            }
        if let index = pairs.lastIndex(where: { $0.key == key }) {
            pairs[index].value = text
        } else {
            pairs.append((key, text))
        }
    }

    private static func setting(_ value: JSONValue, _ path: ArraySlice<Substring>, _ new: JSONValue) -> JSONValue {
        guard let first = path.first else { return new }
        var members = value.object
        members[String(first)] = setting(members[String(first)] ?? .object([:]), path.dropFirst(), new)
        return .object(members)
    }

    /// Removes a key and all that is under it.
    mutating func remove(_ key: String) {
        if let json {
            self.json = Self.removing(json, key.split(separator: ".")[...])
        } else {
            pairs.removeAll { $0.key == key || $0.key.hasPrefix("\(key).") }
        }
    }

    private static func removing(_ value: JSONValue, _ path: ArraySlice<Substring>) -> JSONValue {
        guard let first = path.first, case .object(var members) = value else { return value }
        if path.count == 1 {
            members[String(first)] = nil
        } else if let member = members[String(first)] {
            members[String(first)] = removing(member, path.dropFirst())
        }
        return .object(members)
    }

    /// Moves everything but some names one level down.
    mutating func nest(under key: String, except kept: Set<String>) {
        if let json {
            var outer = json.object.filter { kept.contains($0.key) }
            outer[key] = .object(json.object.filter { !kept.contains($0.key) })
            self.json = .object(outer)
        } else {
            implied = nil
            pairs = pairs.map { pair in
                kept.contains(String(pair.key.prefix { $0 != "." })) ? pair : ("\(key).\(pair.key)", pair.value)
            }
        }
    }

    /// The first part of an argument when it has no key.
    static func first(_ argument: String) -> String? {
        KeyValue.split(argument).first.flatMap { $0.contains("=") || $0.isEmpty ? nil : $0 }
    }

    /// The value of one key of an argument.
    static func value(of key: String, in argument: String) -> String? { (try? BlockOptions(parsing: argument))?[key] }
}
