/// QEMU's comma-separated lists of `key=value`, in which a comma within a value is doubled.
public enum KeyValue {
    /// What a key stands for in the dotted form.
    public enum Value: Sendable, Equatable {
        /// What is written.
        case text(String)
        /// The values of `key.0`, `key.1`, ...
        case list([Value])
        /// The values of `key.NAME`.
        case record([String: Value])
    }

    /// Why a text is no such list, naming the key.
    public struct Malformed: Error, CustomStringConvertible {
        /// The sentence.
        public let description: String

        init(_ description: String) { self.description = description }
    }

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

    /// How long a part of a key may be.
    private static let fragmentLimit = 127
    /// How deep a dotted key may reach; QEMU has no bound, no object needs more than three.
    private static let depthLimit = 16

    /// Parses the dotted form, as QEMU's `keyval_parse` does.
    ///
    /// The first part may be a value alone, for the implied key. A key is a sequence of names and list indices with dots in
    /// between; when a key occurs twice, the last one counts. A comma at the very end is allowed.
    ///
    /// - Parameters:
    ///   - text: the list.
    ///   - implied: the key of a first part without `=`.
    /// - Throws: `KeyValue.Malformed` that names the key, never a value.
    public static func parse(_ text: String, implied: String) throws -> [String: Value] {
        let bytes = Array(text.utf8)
        var root = Node()
        var position = 0
        var isFirst = true
        while position < bytes.count {
            let start = position
            while position < bytes.count, bytes[position] != UInt8(ascii: "="), bytes[position] != UInt8(ascii: ",") {
                position += 1
            }
            let key: String
            var value: [UInt8] = []
            if isFirst, position > start, position == bytes.count || bytes[position] == UInt8(ascii: ",") {
                key = implied
                value = Array(bytes[start..<position])
                position += 1
            } else {
                key = String(decoding: bytes[start..<position], as: UTF8.self)
                try checkKey(key)
                guard position < bytes.count, bytes[position] == UInt8(ascii: "=") else {
                    throw Malformed("Expected '=' after parameter '\(key)'")
                }
                position += 1
                while position < bytes.count {
                    if bytes[position] == UInt8(ascii: ",") {
                        position += 1
                        guard position < bytes.count, bytes[position] == UInt8(ascii: ",") else { break }
                    }
                    value.append(bytes[position])
                    position += 1
                }
            }
            guard let text = String(validating: value, as: UTF8.self) else {
                throw Malformed("The value of parameter '\(key)' is not UTF-8")
            }
            try root.set(key.split(separator: ".", omittingEmptySubsequences: false), text, key)
            isFirst = false
        }
        guard case .record(let record) = try root.value("") else { throw Malformed("Invalid parameter ''") }
        return record
    }

    private static func checkKey(_ key: String) throws {
        let fragments = key.split(separator: ".", omittingEmptySubsequences: false)
        guard fragments.count <= depthLimit else {
            throw Malformed("Parameter '\(key.prefix(64))...' is too long")
        }
        for (index, fragment) in fragments.enumerated() {
            let isIndex = index > 0 && !fragment.isEmpty && fragment.utf8.allSatisfy { (48...57).contains($0) }
            let isName =
                fragment.utf8.first.map { isLetter($0) } == true
                && fragment.utf8.allSatisfy { isLetter($0) || (48...57).contains($0) || $0 == 45 || $0 == 95 }
            guard isIndex || isName else { throw Malformed("Invalid parameter '\(key.prefix(64))'") }
            guard fragment.utf8.count <= fragmentLimit else {
                throw Malformed("Parameter '\(key.prefix(64))...' is too long")
            }
        }
    }

    private static func isLetter(_ byte: UInt8) -> Bool { (65...90).contains(byte) || (97...122).contains(byte) }

    private struct Node {
        var text: String?
        var children: [Substring: Node] = [:]

        mutating func set(_ path: [Substring], _ value: String, _ key: String) throws {
            guard let first = path.first else {
                guard children.isEmpty else { throw Malformed("Parameters '\(key).*' used inconsistently") }
                text = value
                return
            }
            guard text == nil else { throw Malformed("Parameters '\(key)' used inconsistently") }
            try children[first, default: Node()].set(Array(path.dropFirst()), value, key)
        }

        func value(_ path: String) throws -> Value {
            if let text { return .text(text) }
            let indices = children.keys.compactMap { UInt32($0) }
            guard !indices.isEmpty else {
                return .record(
                    try Dictionary(uniqueKeysWithValues: children.map { (String($0), try $1.value("\(path)\($0).")) })
                )
            }
            guard indices.count == children.count else {
                throw Malformed("Parameters '\(path)*' used inconsistently")
            }
            return .list(
                try indices.sorted().enumerated().map { position, index in
                    guard index == position, let child = children[Substring(String(index))] else {
                        throw Malformed("Parameter '\(path)\(position)' missing")
                    }
                    return try child.value("\(path)\(index).")
                }
            )
        }
    }
}
