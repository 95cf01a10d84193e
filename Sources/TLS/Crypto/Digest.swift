internal import IO

/// The result of a hash function or a message authentication code.
public struct Digest: Sendable, Hashable, CustomStringConvertible {
    /// The bytes.
    public let bytes: [UInt8]

    /// Makes a digest of bytes.
    public init(bytes: [UInt8]) { self.bytes = bytes }

    /// Lower-case hexadecimal.
    public var hex: String { bytes.hex }
    /// Base64 (RFC 4648, section 4), with padding.
    public var base64: String { Base64.encode(bytes) }
    /// The hexadecimal form.
    public var description: String { hex }

    /// Whether two digests are equal, in a time that does not tell where they differ.
    public func matches(_ other: Digest) -> Bool {
        guard bytes.count == other.bytes.count else { return false }
        var difference: UInt8 = 0
        for (a, b) in zip(bytes, other.bytes) { difference |= a ^ b }
        return difference == 0
    }
}
