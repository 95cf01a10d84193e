internal import IO
public import TLS

/// What opens a guest's console on the host that has the guest, for the identity that gave it: 256 random bits.
///
/// The host that a guest leaves makes one. It keeps the grant itself, the guest's next host keeps the SHA-256.
public struct ConsoleGrant: Sendable, Hashable, Codable, CustomStringConvertible {
    private static let count = 32

    private let bytes: [UInt8]

    /// Makes one that there has never been.
    public init() {
        var generator = SystemRandomNumberGenerator()
        bytes = (0..<Self.count).map { _ in UInt8.random(in: 0...255, using: &generator) }
    }

    /// Reads one from hexadecimal text; nil when it is none.
    public init?(_ text: String) {
        guard text.utf8.count == 2 * Self.count, let bytes = [UInt8](hex: text) else { return nil }
        self.bytes = bytes
    }

    /// In hexadecimal, for a file or a message that nobody else reads.
    public var text: String { bytes.hex }

    /// What is kept of it by who is shown it.
    public var digest: Digest { Digest(bytes: HashAlgorithm.sha256.hash(bytes)) }

    /// Nothing of it, so that it gets into no log.
    public var description: String { "a grant" }

    /// Reads it from text.
    public init(from decoder: any Decoder) throws {
        let text = try decoder.singleValueContainer().decode(String.self)
        guard let grant = Self(text) else {
            throw DecodingError.dataCorrupted(.init(codingPath: decoder.codingPath, debugDescription: "no grant"))
        }
        self = grant
    }

    /// Writes it as text.
    public func encode(to encoder: any Encoder) throws {
        var container = encoder.singleValueContainer()
        try container.encode(text)
    }
}

/// GRANT: the former host of a guest may have its consoles.
public struct ConsoleGranting: Sendable, Hashable, Codable {
    /// What it will show.
    public var grant: ConsoleGrant
    /// Whether it may write there; reading it may always.
    public var write: Bool
    /// For how many seconds without being used; at most `ConsoleGrantBook.longestLife` count.
    public var seconds: Int

    /// Makes one.
    public init(_ grant: ConsoleGrant, write: Bool = true, seconds: Int = ConsoleGrantBook.longestLife) {
        (self.grant, self.write, self.seconds) = (grant, write, seconds)
    }
}
