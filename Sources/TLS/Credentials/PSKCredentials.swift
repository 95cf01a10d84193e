internal import CGnuTLS
internal import Glibc

/// Pre-shared keys in a directory's `keys.psk`, one `user:hexkey` a line. QEMU's `tls-creds-psk`.
public final class PSKCredentials: TLSCredentials, @unchecked Sendable {
    // Unchecked: GnuTLS credentials are read-only once they are loaded and may be shared by sessions on any thread.

    /// The object's id.
    public let id: String
    /// The end they are for.
    public let endpoint: TLSEndpoint
    /// The directory they were loaded from.
    public let directory: String
    /// A peer without the key cannot finish the handshake.
    public let verifiesPeer = true
    /// The GnuTLS priority string.
    public let priority: String
    /// Keys, not certificates, identify the peers.
    public let usesCertificates = false
    private var server: gnutls_psk_server_credentials_t?
    private var client: gnutls_psk_client_credentials_t?

    /// Loads a directory.
    ///
    /// - Parameters:
    ///   - id: the object's id.
    ///   - directory: QEMU's `dir`.
    ///   - endpoint: which end.
    ///   - username: whose key a client uses; "qemu" when it is not given. Not allowed for a server.
    ///   - priority: a GnuTLS priority string instead of the default one.
    /// - Throws: `CredentialError`.
    public init(
        id: String,
        directory: String,
        endpoint: TLSEndpoint,
        username: String? = nil,
        priority: String? = nil
    ) throws {
        self.id = id
        self.endpoint = endpoint
        self.directory = directory
        self.priority = priority ?? TLSPriority.psk
        let path = try CredentialFile.require(directory, "keys.psk")
        switch endpoint {
        case .server:
            if username != nil { throw CredentialError("'username' should not be set when endpoint=server") }
            try GnuTLS.check(gnutls_psk_allocate_server_credentials(&server), "Cannot allocate credentials")
            try GnuTLS.check(gnutls_psk_set_server_credentials_file(server, path), "Cannot load '\(path)'")
        case .client:
            let user = username ?? "qemu"
            var key = try Self.key(of: user, in: path)
            defer { key.withUnsafeMutableBytes { gnutls_memset($0.baseAddress, 0, $0.count) } }
            try GnuTLS.check(gnutls_psk_allocate_client_credentials(&client), "Cannot allocate credentials")
            let code = key.withUnsafeMutableBufferPointer { buffer in
                var datum = gnutls_datum_t(data: buffer.baseAddress, size: UInt32(buffer.count))
                return gnutls_psk_set_client_credentials(client, user, &datum, GNUTLS_PSK_KEY_HEX)
            }
            try GnuTLS.check(code, "The key of user '\(user)' in '\(path)' is unusable")
        }
    }

    deinit {
        if let server { gnutls_psk_free_server_credentials(server) }
        if let client { gnutls_psk_free_client_credentials(client) }
    }

    private static func key(of user: String, in path: String) throws -> [UInt8] {
        var contents = try CredentialFile.contents(path)
        defer { contents.withUnsafeMutableBytes { gnutls_memset($0.baseAddress, 0, $0.count) } }
        for line in contents.split(whereSeparator: { $0 == UInt8(ascii: "\n") || $0 == UInt8(ascii: "\r") }) {
            guard line.first != UInt8(ascii: "#"), let colon = line.lastIndex(of: UInt8(ascii: ":")) else { continue }
            if Array(line[..<colon]) == Array(user.utf8) { return Array(line[(colon + 1)...]) }
        }
        throw CredentialError("Username '\(user)' not found in PSK file '\(path)'")
    }

    /// See `TLSCredentials.attach(to:)`.
    public func attach(to session: OpaquePointer) throws {
        let handle = server.map { UnsafeMutableRawPointer($0) } ?? client.map { UnsafeMutableRawPointer($0) }
        try GnuTLS.check(
            gnutls_credentials_set(session, GNUTLS_CRD_PSK, handle),
            "Cannot use the credentials '\(id)'"
        )
    }
}
