internal import CGnuTLS

/// Encryption without any authentication: QEMU's `tls-creds-anon`. Only TLS 1.2 has it, and only tests should use it: an
/// active attacker in between is not noticed.
public final class AnonymousCredentials: TLSCredentials, @unchecked Sendable {
    // Unchecked: GnuTLS credentials are read-only once they are made and may be shared by sessions on any thread.

    /// The object's id.
    public let id: String
    /// The type.
    public let type = "tls-creds-anon"
    /// The end they are for.
    public let endpoint: TLSEndpoint
    /// QEMU's `dir`, which nothing is read from.
    public let directory: String
    /// Nobody is verified.
    public let verifiesPeer = false
    /// The GnuTLS priority string.
    public let priority: String
    /// There are no certificates.
    public let usesCertificates = false
    /// That nobody is verified.
    public var warnings: [String] {
        ["Object '\(id)' of type tls-creds-anon authenticates nobody; an attacker in between is not noticed"]
    }
    private var server: gnutls_anon_server_credentials_t?
    private var client: gnutls_anon_client_credentials_t?

    /// Makes credentials for one end.
    public init(id: String, endpoint: TLSEndpoint, directory: String = "", priority: String? = nil) throws {
        self.id = id
        self.endpoint = endpoint
        self.directory = directory
        self.priority = priority.map { $0 + TLSPriority.anonSuffix } ?? TLSPriority.anon
        switch endpoint {
        case .server:
            try GnuTLS.check(gnutls_anon_allocate_server_credentials(&server), "Cannot allocate credentials")
        case .client:
            try GnuTLS.check(gnutls_anon_allocate_client_credentials(&client), "Cannot allocate credentials")
        }
    }

    deinit {
        if let server { gnutls_anon_free_server_credentials(server) }
        if let client { gnutls_anon_free_client_credentials(client) }
    }

    /// See `TLSCredentials.attach(to:)`.
    public func attach(to session: OpaquePointer) throws -> AnyObject {
        let handle = server.map { UnsafeMutableRawPointer($0) } ?? client.map { UnsafeMutableRawPointer($0) }
        try GnuTLS.check(
            gnutls_credentials_set(session, GNUTLS_CRD_ANON, handle),
            "Cannot use the credentials '\(id)'"
        )
        return self
    }

    /// There is nothing to load.
    public func reload() {}
}
