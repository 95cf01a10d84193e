/// The end of a connection that credentials are made for, QEMU's `endpoint`.
public enum TLSEndpoint: String, Sendable {
    /// Accepts connections.
    case server
    /// Opens connections.
    case client
}

/// Named credentials that any number of sessions share: QEMU's `tls-creds-x509` or `tls-creds-psk` object.
public protocol TLSCredentials: AnyObject, Sendable {
    /// The object's id.
    var id: String { get }
    /// The end they are for.
    var endpoint: TLSEndpoint { get }
    /// The directory they were loaded from, for messages.
    var directory: String { get }
    /// Whether the peer's identity is verified.
    var verifiesPeer: Bool { get }
    /// The GnuTLS priority string of their sessions.
    var priority: String { get }
    /// Whether peers are authenticated by certificates.
    var usesCertificates: Bool { get }

    /// Attaches the credentials to a GnuTLS session, given as an opaque pointer.
    func attach(to session: OpaquePointer) throws
}

/// The priority strings: TLS 1.2 is the minimum and AES-GCM comes first, since GnuTLS's own order for PSK prefers
/// ChaCha20, which is several times slower on a CPU with AES; a server insists on its order.
enum TLSPriority {
    static let base =
        "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2:-CIPHER-ALL:+AES-128-GCM:+AES-256-GCM:+CHACHA20-POLY1305"
        + ":%SERVER_PRECEDENCE"
    static let psk = base + ":+ECDHE-PSK:+DHE-PSK:+PSK"
}
