internal import IO
public import TLS

/// How two agents show each other that they know a disk's lineage, without saying it.
///
/// Each shows an HMAC over both sides' nonces, the name of the disk, which side it is, and a key that only the two ends of this TLS
/// session have (`TLSSession.exportKey`): a proof is worth nothing to anybody else, in any other session, or for another disk.
public struct SeedExchange: Sendable {
    /// Who proves.
    public enum Side: String, Sendable {
        /// The host that the guest leaves.
        case source
        /// The host that it comes to.
        case destination
    }

    private static let label = "EXPORTER-crossdock-seed"
    private static let nonceBytes = 32
    private let prefix: [UInt8]

    /// Prepares proofs.
    ///
    /// - Parameters:
    ///   - session: the session of the control connection.
    ///   - source: the source's nonce, as `makeNonce` makes it.
    ///   - destination: the destination's nonce.
    /// - Throws: `ChannelError` when a nonce is none, or the session has no key to bind to.
    public init(_ session: TLSSession, source: String, destination: String) throws {
        guard let first = [UInt8](hex: source), let second = [UInt8](hex: destination),
            first.count == Self.nonceBytes, second.count == Self.nonceBytes
        else { throw ChannelError(.protocolViolation, "A nonce of a proof of lineage is malformed") }
        prefix = try session.exportKey(Self.label, count: 32) + first + second
    }

    /// A nonce that was never used, in hexadecimal.
    public static func makeNonce() -> String {
        var generator = SystemRandomNumberGenerator()
        return (0..<nonceBytes).map { _ in UInt8.random(in: 0...255, using: &generator) }.hex
    }

    /// Proves that a side knows a lineage.
    ///
    /// - Parameters:
    ///   - lineage: what it knows.
    ///   - side: who proves.
    ///   - disk: the disk's name in the offer.
    /// - Returns: the proof in hexadecimal.
    /// - Throws: `CryptoError` when there is no SHA-256.
    public func proof(of lineage: Lineage, by side: Side, for disk: String) throws -> String {
        try code(lineage, side, disk).hex
    }

    /// Whether a proof is right, in a time that does not tell where it is not.
    public func isProof(_ proof: String, of lineage: Lineage, by side: Side, for disk: String) -> Bool {
        guard let bytes = [UInt8](hex: proof), let right = try? code(lineage, side, disk) else { return false }
        return right.matches(Digest(bytes: bytes))
    }

    private func code(_ lineage: Lineage, _ side: Side, _ disk: String) throws -> Digest {
        try Hash.hmac(.sha256, key: lineage.bytes, of: prefix + Array("\(side.rawValue) \(disk)".utf8))
    }
}
