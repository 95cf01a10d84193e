internal import IO

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

    /// The names and addresses that it may be called by, as `crossdock pki issue` takes them, at most ten.
    var hostNames: [String] {
        let names = (alternativeNames ?? []).filter { $0.hasPrefix("DNS:") || $0.hasPrefix("IP:") }.map {
            String($0[$0.index(after: $0.firstIndex(of: ":") ?? $0.startIndex)...])
        }
        // What has no other names goes by its common name.
        let common = (distinguishedName ?? "").split(separator: ",").filter { $0.hasPrefix("CN=") }.map {
            String($0.dropFirst(3))
        }
        return (names.isEmpty ? common : names).prefix(10).map { $0.shown(most: 255) }
    }

    /// The identity for messages and comparisons.
    public var name: String { distinguishedName ?? pskUser ?? fingerprint ?? "anonymous" }
}
