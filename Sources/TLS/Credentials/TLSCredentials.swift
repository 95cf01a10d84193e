/// The end of a connection that credentials are made for, QEMU's `endpoint`.
public enum TLSEndpoint: String, Sendable, CaseIterable {
    /// Accepts connections.
    case server
    /// Opens connections.
    case client
}

/// Named credentials that any number of sessions share: QEMU's `tls-creds-x509`, `-psk` and `-anon` objects.
public protocol TLSCredentials: SecurityObject {
    /// The end they are for.
    var endpoint: TLSEndpoint { get }
    /// The directory they were loaded from, for messages.
    var directory: String { get }
    /// Whether the peer's identity is verified: by a certificate, or by knowing the key.
    var verifiesPeer: Bool { get }
    /// The GnuTLS priority string of their sessions.
    var priority: String { get }
    /// Whether peers are authenticated by certificates.
    var usesCertificates: Bool { get }
    /// What an operator should know although the credentials work: a certificate that expires soon, a key that others can
    /// read. As of the last load.
    var warnings: [String] { get }

    /// Attaches the credentials to a GnuTLS session, given as an opaque pointer.
    ///
    /// - Returns: what must stay alive as long as the session does.
    func attach(to session: OpaquePointer) throws -> AnyObject

    /// Loads the files again. New sessions use the new credentials, sessions that exist go on as they are.
    ///
    /// - Throws: `CredentialError`; then everything stays as it was.
    func reload() throws
}
