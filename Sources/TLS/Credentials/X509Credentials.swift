internal import CGnuTLS
internal import Glibc

/// Certificates in QEMU's directory layout: `ca-cert.pem`, `ca-crl.pem`, and `server-cert.pem` with `server-key.pem` or
/// `client-cert.pem` with `client-key.pem`. QEMU's `tls-creds-x509`.
public final class X509Credentials: TLSCredentials, @unchecked Sendable {
    // Unchecked: GnuTLS credentials are read-only once they are loaded and may be shared by sessions on any thread.

    /// The object's id.
    public let id: String
    /// The end they are for.
    public let endpoint: TLSEndpoint
    /// The directory they were loaded from.
    public let directory: String
    /// Whether the peer must present a certificate that the authority signed.
    public let verifiesPeer: Bool
    /// The GnuTLS priority string.
    public let priority: String
    /// Certificates identify the peers.
    public let usesCertificates = true
    private let handle: gnutls_certificate_credentials_t

    /// Loads a directory.
    ///
    /// - Parameters:
    ///   - id: the object's id.
    ///   - directory: QEMU's `dir`.
    ///   - endpoint: which end; a client's own certificate is optional, a server's is required.
    ///   - verifyPeer: QEMU's `verify-peer`.
    ///   - priority: a GnuTLS priority string instead of the default one.
    ///   - sanityCheck: whether the certificate's dates and its authority are checked now rather than by the peer.
    /// - Throws: `CredentialError` naming the file, what is wrong with it and what to do.
    public init(
        id: String,
        directory: String,
        endpoint: TLSEndpoint,
        verifyPeer: Bool = true,
        priority: String? = nil,
        sanityCheck: Bool = true
    ) throws {
        self.id = id
        self.endpoint = endpoint
        self.directory = directory
        verifiesPeer = verifyPeer
        self.priority = priority ?? TLSPriority.base
        var handle: gnutls_certificate_credentials_t?
        try GnuTLS.check(gnutls_certificate_allocate_credentials(&handle), "Cannot allocate credentials")
        self.handle = handle!
        try load(sanityCheck: sanityCheck)
    }

    deinit { gnutls_certificate_free_credentials(handle) }

    private func load(sanityCheck: Bool) throws {
        let authority = try CredentialFile.require(directory, "ca-cert.pem")
        let loaded = gnutls_certificate_set_x509_trust_file(handle, authority, GNUTLS_X509_FMT_PEM)
        try GnuTLS.check(loaded, "Cannot load CA certificate '\(authority)'")
        if loaded == 0 { throw CredentialError("'\(authority)' holds no CA certificate") }
        if let revoked = try CredentialFile.find(directory, "ca-crl.pem") {
            try GnuTLS.check(
                gnutls_certificate_set_x509_crl_file(handle, revoked, GNUTLS_X509_FMT_PEM),
                "Cannot load CRL '\(revoked)'"
            )
        }
        let prefix = endpoint.rawValue
        let certificate: String
        switch endpoint {
        case .server: certificate = try CredentialFile.require(directory, "server-cert.pem")
        case .client:
            guard let found = try CredentialFile.find(directory, "client-cert.pem") else { return }
            certificate = found
        }
        let key = try CredentialFile.require(directory, "\(prefix)-key.pem")
        if sanityCheck { try CertificateFile(certificate).checkSanity(endpoint, authority: CertificateFile(authority)) }
        try GnuTLS.check(
            gnutls_certificate_set_x509_key_file(handle, certificate, key, GNUTLS_X509_FMT_PEM),
            "Cannot load certificate '\(certificate)' and key '\(key)'"
        )
    }

    /// See `TLSCredentials.attach(to:)`.
    public func attach(to session: OpaquePointer) throws {
        try GnuTLS.check(
            gnutls_credentials_set(session, GNUTLS_CRD_CERTIFICATE, UnsafeMutableRawPointer(handle)),
            "Cannot use the credentials '\(id)'"
        )
        if endpoint == .server {
            gnutls_certificate_server_set_request(session, verifiesPeer ? GNUTLS_CERT_REQUIRE : GNUTLS_CERT_IGNORE)
        }
    }
}

/// The files of a credential directory.
enum CredentialFile {
    /// The path of a file that must be there and readable.
    static func require(_ directory: String, _ name: String) throws -> String {
        guard let path = try find(directory, name) else {
            throw CredentialError(
                "Unable to access credentials \(directory)/\(name): No such file or directory; "
                    + "make it with 'crossdock pki' or point 'dir=' at the right directory"
            )
        }
        return path
    }

    /// The path of a file that may be missing, but must be a readable plain file when it is there.
    static func find(_ directory: String, _ name: String) throws -> String? {
        let path = "\(directory)/\(name)"
        var status = stat()
        guard stat(path, &status) == 0 else {
            if errno == ENOENT { return nil }
            throw CredentialError("Unable to access credentials \(path): \(String(cString: strerror(errno)))")
        }
        guard status.st_mode & S_IFMT == S_IFREG else {
            throw CredentialError("Unable to access credentials \(path): it is not a plain file")
        }
        guard access(path, R_OK) == 0 else {
            throw CredentialError("Unable to access credentials \(path): \(String(cString: strerror(errno)))")
        }
        return path
    }

    /// The contents of a file of at most 1 MiB.
    static func contents(_ path: String) throws -> [UInt8] {
        let fd = open(path, O_RDONLY | O_CLOEXEC)
        guard fd >= 0 else { throw CredentialError("Cannot read \(path): \(String(cString: strerror(errno)))") }
        defer { close(fd) }
        var bytes = [UInt8](repeating: 0, count: 1 << 20)
        var total = 0
        while total < bytes.count {
            let count = bytes.withUnsafeMutableBytes { Glibc.read(fd, $0.baseAddress! + total, $0.count - total) }
            if count < 0 { throw CredentialError("Cannot read \(path): \(String(cString: strerror(errno)))") }
            if count == 0 { return Array(bytes[..<total]) }
            total += count
        }
        throw CredentialError("\(path) is larger than 1 MiB, which no credential is")
    }
}
