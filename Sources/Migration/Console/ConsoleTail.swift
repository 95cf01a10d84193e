internal import IO

/// The end of what a guest has written to its console, as the agent of its former host kept it: the offsets of the console go on from there.
public struct ConsoleTail: Sendable, Hashable, Codable {
    /// Tells these offsets from others: hexadecimal digits.
    public var ring: String
    /// The offset of the first byte.
    public var offset: UInt64
    /// The bytes, in base64.
    public var data: String
    /// What was typed and not taken by the guest, in base64; nil for nothing.
    public var input: String?
    /// How many bytes the agent of the guest's next host has typed here, in the present connection for the console, that were taken or are in
    /// `input`; nil when there is no such connection.
    public var taken: UInt64?

    /// The most bytes of a tail.
    public static let most = 64 << 10
    /// The largest offset: what a JavaScript number can hold.
    public static let mostOffset: UInt64 = 1 << 53

    /// Makes a tail.
    public init(ring: String, offset: UInt64, bytes: [UInt8]) {
        (self.ring, self.offset, data) = (ring, offset, Base64.encode(bytes))
    }

    /// What was typed; nothing when it is not what it should be.
    public var typed: [UInt8] {
        guard let input, input.utf8.count <= 2 * Self.most, let bytes = Base64.decode(input.utf8),
            bytes.count <= Self.most
        else { return [] }
        return bytes
    }

    /// Adds what was typed, as much as may be.
    public mutating func add(typed bytes: [UInt8]) {
        input = bytes.isEmpty ? nil : Base64.encode(Array(bytes.prefix(Self.most)))
    }

    /// Whether a text can tell a ring from others: 1 to 32 hexadecimal digits in lower case.
    public static func isRing(_ text: String) -> Bool {
        (1...32).contains(text.utf8.count)
            && text.utf8.allSatisfy { ($0 >= 48 && $0 <= 57) || ($0 >= 97 && $0 <= 102) }
    }

    /// The bytes; nil when it is not what it should be.
    public var bytes: [UInt8]? {
        guard offset <= Self.mostOffset, Self.isRing(ring), data.utf8.count <= 2 * Self.most,
            let bytes = Base64.decode(data.utf8), bytes.count <= Self.most
        else { return nil }
        return bytes
    }
}
