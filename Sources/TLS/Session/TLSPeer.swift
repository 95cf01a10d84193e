/// Who the peer of a TLS session proved to be.
public struct TLSPeer: Sendable, Hashable, Codable {
    /// The certificate's distinguished name in RFC 4514 form, in the certificate's own order.
    public var distinguishedName: String?
    /// The user of a pre-shared key.
    public var pskUser: String?
    /// The certificate's subject alternative names, each with its kind: `DNS:host`, `IP:192.0.2.1`, `URI:...`, `EMAIL:...`.
    public var alternativeNames: [String]?

    /// The SHA-256 fingerprint of the certificate, `SHA256:` and hexadecimal digits: the name of who has no other.
    public var fingerprint: String?

    /// Makes an identity.
    public init(distinguishedName: String? = nil, pskUser: String? = nil, alternativeNames: [String]? = nil) {
        self.distinguishedName = distinguishedName
        self.pskUser = pskUser
        self.alternativeNames = alternativeNames
    }

    /// Everything that an authorisation may be about, the main name first; empty for who proved nothing.
    public var identities: [String] {
        ([distinguishedName ?? pskUser ?? fingerprint].compactMap { $0 }) + (alternativeNames ?? [])
    }

    /// The identity for messages and comparisons.
    public var name: String { distinguishedName ?? pskUser ?? fingerprint ?? "anonymous" }
}
