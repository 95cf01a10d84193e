internal import FoundationEssentials

/// JSON text as Crossdock writes it everywhere: keys sorted, slashes as they are.
public enum JSONText {
    /// Encodes a value.
    ///
    /// - Parameters:
    ///   - value: what to encode.
    ///   - pretty: on several lines, for people; otherwise on one line without its end.
    public static func encode(_ value: some Encodable, pretty: Bool = false) throws -> [UInt8] {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        if pretty { encoder.outputFormatting.insert(.prettyPrinted) }
        return Array(try encoder.encode(value))
    }

    /// Decodes a value; nil when the text is something else.
    public static func decode<T: Decodable>(_ type: T.Type, from bytes: [UInt8]) -> T? {
        try? JSONDecoder().decode(type, from: Data(bytes))
    }
}
