/// Takes the properties of an object one by one, in QEMU's words when one does not fit.
struct PropertyReader {
    private var rest: [String: ObjectValue]
    /// Whether texts stand for every type, as in the keyval form.
    private let isKeyval: Bool
    private let prefix: String
    /// What was asked for.
    private var known: [String] = []

    init(_ properties: [String: ObjectValue], isKeyval: Bool, prefix: String = "") {
        rest = properties
        self.isKeyval = isKeyval
        self.prefix = prefix
    }

    private mutating func take(_ key: String) -> ObjectValue? {
        known.append(key)
        return rest.removeValue(forKey: key)
    }

    private func mismatch(_ key: String, _ expected: String) -> CredentialError {
        CredentialError("Invalid parameter type for '\(prefix)\(key)', expected: \(expected)")
    }

    mutating func text(_ key: String) throws -> String? {
        switch take(key) {
        case nil: return nil
        case .text(let text): return text
        case .some: throw mismatch(key, "string")
        }
    }

    mutating func required(_ key: String) throws -> String {
        guard let text = try text(key) else { throw CredentialError("Parameter '\(prefix)\(key)' is missing") }
        return text
    }

    mutating func flag(_ key: String, default value: Bool) throws -> Bool {
        switch take(key) {
        case nil: return value
        case .flag(let flag): return flag
        case .text(let text) where isKeyval:
            switch text {
            case "on", "yes", "true", "y": return true
            case "off", "no", "false", "n": return false
            default: throw CredentialError("Parameter '\(prefix)\(key)' expects 'on' or 'off', not '\(text)'")
            }
        case .some: throw mismatch(key, "boolean")
        }
    }

    mutating func number(_ key: String) throws -> Int? {
        switch take(key) {
        case nil: return nil
        case .number(let number): return number
        case .text(let text) where isKeyval:
            let value = text.hasPrefix("0x") ? Int(text.dropFirst(2), radix: 16) : Int(text)
            guard let value else { throw CredentialError("Parameter '\(prefix)\(key)' expects a number") }
            return value
        case .some: throw mismatch(key, "integer")
        }
    }

    mutating func choice<T: RawRepresentable & CaseIterable>(_ key: String) throws -> T?
    where T.RawValue == String {
        guard let text = try text(key) else { return nil }
        guard let value = T(rawValue: text) else {
            let known = T.allCases.map(\.rawValue).joined(separator: ", ")
            throw CredentialError("Parameter '\(prefix)\(key)' does not accept value '\(text)'; known are \(known)")
        }
        return value
    }

    mutating func records(_ key: String) throws -> [PropertyReader]? {
        switch take(key) {
        case nil: return nil
        case .list(let items):
            return try items.enumerated().map { index, item in
                guard case .record(let record) = item else { throw mismatch("\(key)[\(index)]", "object") }
                return PropertyReader(record, isKeyval: isKeyval, prefix: "\(prefix)\(key)[\(index)].")
            }
        case .some: throw mismatch(key, "array")
        }
    }

    /// Throws when a property is left that nobody asked for.
    func finish() throws {
        guard let key = rest.keys.sorted().first else { return }
        throw CredentialError(
            "Parameter '\(prefix)\(key)' is unexpected; known are \(known.sorted().joined(separator: ", "))"
        )
    }
}
