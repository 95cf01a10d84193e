internal import FoundationEssentials

/// A `--object TYPE,id=ID,key=value,...` as QEMU writes it: keyval form, or JSON when it starts with `{`.
public struct ObjectDescription: Sendable, Equatable {
    /// The type: `tls-creds-x509`.
    public var type: String
    /// The id by which others refer to it.
    public var id: String
    /// The other properties; booleans are "on" or "off".
    public var properties: [String: String]

    /// Parses a description.
    ///
    /// In the keyval form a comma within a value is written twice.
    ///
    /// - Throws: `CredentialError` that names the part that cannot be understood.
    public init(parsing text: String) throws {
        var pairs: [(String, String)]
        if text.hasPrefix("{") {
            pairs = try Self.parseJSON(text)
            guard let index = pairs.firstIndex(where: { $0.0 == "qom-type" }) else {
                throw CredentialError("--object '\(text)' has no 'qom-type'")
            }
            type = pairs.remove(at: index).1
        } else {
            let parts = KeyValue.split(text)
            guard let first = parts.first, !first.isEmpty else {
                throw CredentialError("--object needs a type, as in --object tls-creds-x509,id=tls0,dir=DIR")
            }
            var rest = parts.dropFirst()
            if first.contains("=") {
                guard first.hasPrefix("qom-type=") else {
                    throw CredentialError("--object '\(text)' must begin with a type")
                }
                type = String(first.dropFirst(9))
            } else {
                type = first
            }
            pairs = []
            while let part = rest.popFirst() {
                guard let equals = part.firstIndex(of: "=") else {
                    throw CredentialError("In --object '\(text)', '\(part)' is not key=value")
                }
                pairs.append((String(part[..<equals]), String(part[part.index(after: equals)...])))
            }
        }
        var properties: [String: String] = [:]
        for (key, value) in pairs { properties[key] = value }
        guard let id = properties.removeValue(forKey: "id"), !id.isEmpty else {
            throw CredentialError("--object '\(text)' has no id, as in --object \(type),id=tls0")
        }
        self.id = id
        self.properties = properties
    }

    private static func parseJSON(_ text: String) throws -> [(String, String)] {
        guard let value = try? JSONDecoder().decode([String: Scalar].self, from: Data(text.utf8)) else {
            throw CredentialError("--object '\(text)' is not a JSON object of plain values")
        }
        return value.map { ($0.key, $0.value.text) }
    }

    private enum Scalar: Decodable {
        case text(String), flag(Bool), number(Int)

        init(from decoder: any Decoder) throws {
            let container = try decoder.singleValueContainer()
            if let flag = try? container.decode(Bool.self) {
                self = .flag(flag)
            } else if let number = try? container.decode(Int.self) {
                self = .number(number)
            } else {
                self = .text(try container.decode(String.self))
            }
        }

        var text: String {
            switch self {
            case .text(let text): text
            case .flag(let flag): flag ? "on" : "off"
            case .number(let number): String(number)
            }
        }
    }

    /// A property that is a switch, in any of QEMU's spellings.
    func flag(_ key: String, default value: Bool) throws -> Bool {
        switch properties[key] {
        case nil: return value
        case "on", "yes", "true", "y": return true
        case "off", "no", "false", "n": return false
        case let text?: throw CredentialError("In object '\(id)', \(key)=\(text) is neither on nor off")
        }
    }
}

/// QEMU's comma-separated lists, in which a comma within an item is doubled.
public enum KeyValue {
    /// Splits at single commas and undoes the doubling.
    public static func split(_ text: String) -> [String] {
        var parts: [String] = []
        var current = ""
        var iterator = text.makeIterator()
        var held = iterator.next()
        while let character = held {
            held = iterator.next()
            if character == "," {
                if held == "," {
                    current.append(",")
                    held = iterator.next()
                } else {
                    parts.append(current)
                    current = ""
                }
            } else {
                current.append(character)
            }
        }
        parts.append(current)
        return parts
    }

    /// Doubles the commas of a value.
    public static func escape(_ value: String) -> String {
        String(value.flatMap { $0 == "," ? [",", ","] : [$0] })
    }
}
