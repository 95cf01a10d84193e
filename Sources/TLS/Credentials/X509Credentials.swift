internal import CGnuTLS
internal import Glibc

/// Certificates in QEMU's directory layout: `ca-cert.pem`, `ca-crl.pem`, and `server-cert.pem` with `server-key.pem` or
/// `client-cert.pem` with `client-key.pem`. QEMU's `tls-creds-x509`.
///
/// A certificate file may go on with intermediate authorities. Further identities, for peers with other algorithms or names,
/// are `server-cert-0.pem` with `server-key-0.pem` and so on, up to the first number that is missing.
public final class X509Credentials: TLSCredentials {
    /// What was loaded at one time; sessions keep the one they began with.
    private final class Loaded: @unchecked Sendable {
        // Unchecked: GnuTLS credentials are read-only once they are loaded and may be shared by sessions on any thread.
        let handle: gnutls_certificate_credentials_t
        var findings: [CertificateFinding] = []

        init() throws {
            var handle: gnutls_certificate_credentials_t?
            try GnuTLS.check(gnutls_certificate_allocate_credentials(&handle), "Cannot allocate credentials")
            self.handle = handle!
        }

        deinit { gnutls_certificate_free_credentials(handle) }
    }

    /// The object's id.
    public let id: String
    /// The type.
    public let type = "tls-creds-x509"
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
    private let sanityCheck: Bool
    private let passphrase: Secret?
    private let current: Reloadable<Loaded>

    /// Loads a directory.
    ///
    /// - Parameters:
    ///   - id: the object's id.
    ///   - directory: QEMU's `dir`.
    ///   - endpoint: which end; a client's own certificate is optional, a server's is required.
    ///   - verifyPeer: QEMU's `verify-peer`.
    ///   - priority: a GnuTLS priority string instead of the default one.
    ///   - sanityCheck: whether the certificates are checked now rather than by the peer.
    ///   - passphrase: QEMU's `passwordid`: what the private keys are encrypted with.
    /// - Throws: `CredentialError` naming the file, what is wrong with it and what to do.
    public init(
        id: String,
        directory: String,
        endpoint: TLSEndpoint,
        verifyPeer: Bool = true,
        priority: String? = nil,
        sanityCheck: Bool = true,
        passphrase: Secret? = nil
    ) throws {
        self.id = id
        self.endpoint = endpoint
        self.directory = directory
        verifiesPeer = verifyPeer
        self.priority = priority ?? TLSPriority.base
        self.sanityCheck = sanityCheck
        self.passphrase = passphrase
        current = Reloadable(try Self.load(directory, endpoint, sanityCheck: sanityCheck, passphrase: passphrase))
    }

    /// See `TLSCredentials.reload()`.
    public func reload() throws {
        try current.reload { try Self.load(directory, endpoint, sanityCheck: sanityCheck, passphrase: passphrase) }
    }

    /// See `TLSCredentials.warnings`.
    public var warnings: [String] { current.value.findings.map(\.message) }

    /// See `TLSCredentials.attach(to:)`.
    public func attach(to session: OpaquePointer) throws -> AnyObject {
        let loaded = current.value
        try GnuTLS.check(
            gnutls_credentials_set(session, GNUTLS_CRD_CERTIFICATE, UnsafeMutableRawPointer(loaded.handle)),
            "Cannot use the credentials '\(id)'"
        )
        if endpoint == .server {
            gnutls_certificate_server_set_request(session, verifiesPeer ? GNUTLS_CERT_REQUIRE : GNUTLS_CERT_IGNORE)
        }
        return loaded
    }

    /// Checks a directory for one end without using it.
    ///
    /// - Returns: everything that is wrong with it; empty when all is well. A file that cannot be read or parsed is a
    ///   finding as well.
    public static func check(
        directory: String,
        endpoint: TLSEndpoint,
        passphrase: Secret? = nil
    ) -> [CertificateFinding] {
        do {
            let loaded = try load(directory, endpoint, sanityCheck: true, passphrase: passphrase, collecting: true)
            return loaded.findings
        } catch {
            return [.init(severity: .error, file: directory, field: "file", message: "\(error)")]
        }
    }

    private static func load(
        _ directory: String,
        _ endpoint: TLSEndpoint,
        sanityCheck: Bool,
        passphrase: Secret?,
        collecting: Bool = false
    ) throws -> Loaded {
        let loaded = try Loaded()
        let authorityPath = try CredentialFile.require(directory, "ca-cert.pem")
        let authorityBytes = try CredentialFile.contents(authorityPath)
        let revocationPath = try CredentialFile.find(directory, "ca-crl.pem")
        let revocationBytes = try revocationPath.map(CredentialFile.contents)
        let authorities = try Certificate.list(authorityBytes, what: "CA certificate list \(authorityPath)")
        let identities = try identities(directory, endpoint)

        var findings: [CertificateFinding] = []
        let chains = try identities.map { identity in
            let contents = try CredentialFile.contents(identity.certificate)
            let what = "\(endpoint.rawValue) certificate \(identity.certificate)"
            return (path: identity.certificate, contents: contents, chain: try Certificate.list(contents, what: what))
        }
        if sanityCheck {
            let owns: [(path: String, chain: [Certificate])?] =
                chains.isEmpty ? [nil] : chains.map { ($0.path, $0.chain) }
            for own in owns {
                let check = CertificateCheck(
                    own: own,
                    authorities: (authorityPath, authorities),
                    revocations: revocationBytes,
                    endpoint: endpoint
                )
                for finding in try check.findings() where !findings.contains(finding) { findings.append(finding) }
            }
            if !collecting, let first = findings.first(where: { $0.severity == .error }) {
                throw CredentialError(first.message)
            }
        }
        let trusted = withDatum(authorityBytes) {
            gnutls_certificate_set_x509_trust_mem(loaded.handle, &$0, GNUTLS_X509_FMT_PEM)
        }
        try GnuTLS.check(trusted, "Cannot load CA certificate '\(authorityPath)'")
        if let revocationPath, let revocationBytes {
            let code = withDatum(revocationBytes) {
                gnutls_certificate_set_x509_crl_mem(loaded.handle, &$0, GNUTLS_X509_FMT_PEM)
            }
            try GnuTLS.check(code, "Cannot load CRL '\(revocationPath)'")
        }
        for (identity, chain) in zip(identities, chains) {
            if let exposure = CredentialFile.exposure(identity.key) {
                findings.append(.init(severity: .warning, file: identity.key, field: "permissions", message: exposure))
            }
            do {
                try loadKey(identity.key, for: identity.certificate, chain.contents, into: loaded, passphrase)
            } catch let error as CredentialError where collecting {
                findings.append(.init(severity: .error, file: identity.key, field: "key", message: error.message))
            }
        }
        if endpoint == .server, let unused = try CredentialFile.find(directory, "dh-params.pem") {
            findings.append(
                .init(
                    severity: .warning,
                    file: unused,
                    field: "file",
                    message: "\(unused) is not used: the groups of RFC 7919 are; the file can be removed"
                )
            )
        }
        loaded.findings = findings
        return loaded
    }

    private static func identities(
        _ directory: String,
        _ endpoint: TLSEndpoint
    ) throws -> [(certificate: String, key: String)] {
        let prefix = endpoint.rawValue
        var result: [(certificate: String, key: String)] = []
        for suffix in CredentialFile.identitySuffixes {
            let certificate = try CredentialFile.find(directory, "\(prefix)-cert\(suffix).pem")
            let key = try CredentialFile.find(directory, "\(prefix)-key\(suffix).pem")
            switch (certificate, key) {
            case (let certificate?, let key?): result.append((certificate, key))
            case (let certificate?, nil):
                throw CredentialError(
                    "Cert '\(certificate)' without corresponding key: "
                        + "\(directory)/\(prefix)-key\(suffix).pem: No such file or directory"
                )
            case (nil, let key?):
                throw CredentialError(
                    "Key '\(key)' without corresponding cert: "
                        + "\(directory)/\(prefix)-cert\(suffix).pem: No such file or directory"
                )
            case (nil, nil):
                // A client may have no identity, and a server must have the first one.
                if suffix.isEmpty, endpoint == .server {
                    _ = try CredentialFile.require(directory, "server-cert.pem")
                }
                if !suffix.isEmpty { return result }
            }
        }
        return result
    }

    private static func loadKey(
        _ path: String,
        for certificate: String,
        _ certificateBytes: [UInt8],
        into loaded: Loaded,
        _ passphrase: Secret?
    ) throws {
        let key = try CredentialFile.secretContents(path)
        let load = { (passphrase: UnsafePointer<CChar>?) -> Int32 in
            key.withBytes { keyBytes in
                withDatum(certificateBytes) { certificateDatum in
                    var keyDatum = gnutls_datum_t(
                        data: UnsafeMutableRawPointer(mutating: keyBytes.baseAddress!).assumingMemoryBound(
                            to: UInt8.self
                        ),
                        size: UInt32(keyBytes.count)
                    )
                    return gnutls_certificate_set_x509_key_mem2(
                        loaded.handle,
                        &certificateDatum,
                        &keyDatum,
                        GNUTLS_X509_FMT_PEM,
                        passphrase,
                        0
                    )
                }
            }
        }
        let isEncrypted = key.withBytes { bytes in contains(bytes, "ENCRYPTED") }
        var code: Int32 = 0
        if let passphrase, isEncrypted {
            let accepted = try passphrase.tryPassphrases {
                code = load($0)
                return code >= 0
            }
            if !accepted {
                throw CredentialError(
                    "Cannot load certificate '\(certificate)' & key '\(path)': the passphrase in secret "
                        + "'\(passphrase.id)' does not open the key (\(GnuTLS.message(code)))"
                )
            }
        } else if isEncrypted {
            throw CredentialError(
                "Cannot load certificate '\(certificate)' & key '\(path)': the key is encrypted; give its passphrase with "
                    + "--object secret,id=sec0,file=FILE and passwordid=sec0"
            )
        } else {
            code = load(nil)
        }
        if code == GNUTLS_E_CERTIFICATE_KEY_MISMATCH {
            throw CredentialError(
                "Cannot load certificate '\(certificate)' & key '\(path)': the key does not belong to the certificate"
            )
        }
        try GnuTLS.check(code, "Cannot load certificate '\(certificate)' & key '\(path)'")
    }

    private static func contains(_ bytes: UnsafeRawBufferPointer, _ word: String) -> Bool {
        bytes.firstRange(of: Array(word.utf8)) != nil
    }

    private static func withDatum<T>(_ bytes: [UInt8], _ body: (inout gnutls_datum_t) -> T) -> T {
        var bytes = bytes
        return bytes.withUnsafeMutableBufferPointer { buffer in
            var datum = gnutls_datum_t(data: buffer.baseAddress, size: UInt32(buffer.count))
            return body(&datum)
        }
    }
}
