internal import FoundationEssentials
internal import IO

/// A `--object TYPE,id=ID,key=value,...` as QEMU writes it: keyval form, or JSON when it starts with `{`.
public struct ObjectDescription: Sendable, Equatable {
    /// The type: `tls-creds-x509`.
    public var type: String
    /// The id by which others refer to it.
    public var id: String
    /// The other properties.
    public var properties: [String: ObjectValue]
    /// Whether texts stand for every type, as in the keyval form.
    public private(set) var isKeyval: Bool

    /// Parses a description, with QEMU's rules: `keyval_parse` with the implied key `qom-type`, or JSON.
    ///
    /// - Throws: `CredentialError` that names the parameter which cannot be understood, but no value: one may be a secret.
    public init(parsing text: String) throws {
        if text.hasPrefix("{") {
            guard let value = try? JSONDecoder().decode([String: ObjectValue].self, from: Data(text.utf8)) else {
                throw CredentialError("--object '{...' is not valid JSON")
            }
            try self.init(value, isKeyval: false)
        } else {
            let value: [String: ObjectValue]
            do {
                value = try KeyValue.parse(text, implied: "qom-type").mapValues(ObjectValue.init)
            } catch let error as KeyValue.Malformed {
                throw CredentialError(
                    text.hasPrefix("secret")
                        ? "--object secret,...: not a list of key=value; a comma in a value is written twice"
                        : "--object: \(error)"
                )
            }
            try self.init(value, isKeyval: true)
        }
    }

    /// Makes a description of a record with `qom-type` and `id`, as QMP's object-add has it.
    public init(_ record: [String: ObjectValue], isKeyval: Bool = false) throws {
        var properties = record
        guard case .text(let type)? = properties.removeValue(forKey: "qom-type"), !type.isEmpty else {
            throw CredentialError(
                "--object: Parameter 'qom-type' is missing; an object begins with its type, as in tls-creds-x509,id=tls0,dir=DIR"
            )
        }
        guard case .text(let id)? = properties.removeValue(forKey: "id") else {
            throw CredentialError("--object: Parameter 'id' is missing, as in \(type),id=tls0")
        }
        guard Self.isWellFormed(id) else {
            throw CredentialError(
                "--object: Parameter 'id' expects an identifier: a letter, then letters, digits, '-', '.' and '_'"
            )
        }
        self.type = type
        self.id = id
        self.properties = properties
        self.isKeyval = isKeyval
    }

    private static func isWellFormed(_ id: String) -> Bool {
        let bytes = Array(id.utf8)
        func isLetter(_ byte: UInt8) -> Bool { (65...90).contains(byte) || (97...122).contains(byte) }
        guard let first = bytes.first, isLetter(first) else { return false }
        return bytes.allSatisfy { isLetter($0) || (48...57).contains($0) || $0 == 45 || $0 == 46 || $0 == 95 }
    }

    /// The properties with the types that QMP's object-add wants, whatever form they were written in.
    ///
    /// - Throws: `CredentialError` when a switch is neither on nor off, or a number is none.
    public var typedProperties: [String: ObjectValue] {
        get throws {
            guard isKeyval else { return properties }
            var reader = reader
            var typed = properties
            for key in ["verify-peer", "sanity-check", "refresh", "loaded"] where properties[key] != nil {
                typed[key] = .flag(try reader.flag(key, default: false))
            }
            for key in ["serial", "fd"] where properties[key] != nil {
                typed[key] = try reader.number(key).map { .number($0) }
            }
            return typed
        }
    }

    var reader: PropertyReader { PropertyReader(properties, isKeyval: isKeyval) }
}
