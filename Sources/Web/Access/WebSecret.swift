internal import IO
internal import TLS

/// The secret of a ticket or a session: 256 random bits, of which this process keeps the SHA-256 only.
enum WebSecret {
    private static let count = 32

    /// A new secret, as text for a URL or a cookie.
    static func make() -> String {
        var generator = SystemRandomNumberGenerator()
        return (0..<count).map { _ in UInt8.random(in: 0...255, using: &generator) }.hex
    }

    /// What is kept of a secret that somebody shows; nil for what is none.
    static func digest(of text: String) -> Digest? {
        guard text.utf8.count == 2 * count, let bytes = [UInt8](hex: text) else { return nil }
        return Digest(bytes: HashAlgorithm.sha256.hash(bytes))
    }
}
