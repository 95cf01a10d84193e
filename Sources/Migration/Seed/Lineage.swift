internal import IO

/// What an old image and the disk that it was have in common, and nobody else knows: 256 random bits.
///
/// Each move of a disk makes one. It stays with the image that is left behind, and travels with the guest: whoever knows it has had the
/// disk since that image was whole, so that it can tell him nothing new. A former host knows the lineages up to its own image, and none
/// of those that came later.
public struct Lineage: Sendable, Hashable, Codable, CustomStringConvertible {
    private static let count = 32
    /// How many lineages of a disk are kept, the latest ones: as many hosts can hold a seed of it.
    public static let most = 8

    let bytes: [UInt8]

    /// Makes one that there has never been.
    public init() {
        var generator = SystemRandomNumberGenerator()
        bytes = (0..<Self.count).map { _ in UInt8.random(in: 0...255, using: &generator) }
    }

    /// Reads one from hexadecimal text; nil when it is none.
    public init?(_ text: String) {
        guard let bytes = [UInt8](hex: text), bytes.count == Self.count else { return nil }
        self.bytes = bytes
    }

    /// In hexadecimal, for a file or a message that nobody else reads.
    public var text: String { bytes.hex }

    /// Nothing of it, so that it gets into no log.
    public var description: String { "a lineage" }

    /// Reads it from text.
    public init(from decoder: any Decoder) throws {
        let text = try decoder.singleValueContainer().decode(String.self)
        guard let lineage = Self(text) else {
            throw DecodingError.dataCorrupted(.init(codingPath: decoder.codingPath, debugDescription: "no lineage"))
        }
        self = lineage
    }

    /// Writes it as text.
    public func encode(to encoder: any Encoder) throws {
        var container = encoder.singleValueContainer()
        try container.encode(text)
    }
}
