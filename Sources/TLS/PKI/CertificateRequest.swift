internal import CGnuTLS
internal import Glibc
internal import IO

/// A request for a certificate, PKCS #10: what leaves a host whose private key does not.
public enum CertificateRequest {
    /// Makes a key, ECDSA P-256, and a request for its certificate.
    ///
    /// - Parameters:
    ///   - name: the common name that is asked for; the authority decides.
    ///   - directory: where the key is written, as `server-key.pem` and `client-key.pem` with mode 0600; neither may exist.
    /// - Returns: the request, PEM.
    /// - Throws: `CredentialError`.
    public static func make(name: String, keyIn directory: String) throws -> String {
        let key = try CertificateAuthority.makeKey()
        defer { gnutls_x509_privkey_deinit(key) }
        var request: gnutls_x509_crq_t?
        try GnuTLS.check(gnutls_x509_crq_init(&request), "Cannot make a request")
        defer { gnutls_x509_crq_deinit(request) }
        for code in [
            gnutls_x509_crq_set_version(request, 1),
            gnutls_x509_crq_set_dn_by_oid(request, GNUTLS_OID_X520_COMMON_NAME, 0, name, UInt32(name.utf8.count)),
            gnutls_x509_crq_set_key(request, key),
            gnutls_x509_crq_sign2(request, key, GNUTLS_DIG_SHA256, 0),
        ] { try GnuTLS.check(code, "Cannot make a request for '\(name)'") }
        var text = gnutls_datum_t()
        try GnuTLS.check(gnutls_x509_crq_export2(request, GNUTLS_X509_FMT_PEM, &text), "Cannot write a request")
        defer { xd_gnutls_free(text.data) }
        for endpoint in TLSEndpoint.allCases {
            try CertificateAuthority.write(
                CertificateAuthority.exportKey(key),
                to: "\(directory)/\(endpoint.rawValue)-key.pem",
                mode: 0o600
            )
        }
        return String(decoding: UnsafeBufferPointer(start: text.data, count: Int(text.size)), as: UTF8.self)
    }
}

extension CertificateAuthority {
    /// The authority's certificate, PEM.
    public var pem: String {
        get throws { String(decoding: try Self.exportCertificate(certificate), as: UTF8.self) }
    }

    /// Issues a certificate for both ends, for the key of a request.
    ///
    /// - Parameters:
    ///   - text: the request, PEM. Only its key counts, which has to have signed it.
    ///   - request: the name and the addresses, as the authority knows them, and the time.
    /// - Returns: the certificate, PEM.
    /// - Throws: `CredentialError` for what is no request.
    public func issue(for text: String, _ request: Request) throws -> String {
        var asked: gnutls_x509_crq_t?
        var key: gnutls_pubkey_t?
        try GnuTLS.check(gnutls_x509_crq_init(&asked), "Cannot read a request")
        defer { gnutls_x509_crq_deinit(asked) }
        try GnuTLS.check(gnutls_pubkey_init(&key), "Cannot read a request")
        defer { gnutls_pubkey_deinit(key) }
        try Self.withDatum(Array(text.utf8)) {
            try GnuTLS.check(
                gnutls_x509_crq_import(asked, &$0, GNUTLS_X509_FMT_PEM),
                "The request of '\(request.name)' cannot be read"
            )
        }
        try GnuTLS.check(
            gnutls_x509_crq_verify(asked, 0),
            "The request of '\(request.name)' is not signed by the key that it is for"
        )
        try GnuTLS.check(gnutls_pubkey_import_x509_crq(key, asked, 0), "The key of '\(request.name)' cannot be read")
        let host = try Self.makeCertificate(request.name, starts: request.starts, ends: request.ends) {
            gnutls_x509_crt_set_pubkey($0, key)
        }
        defer { gnutls_x509_crt_deinit(host) }
        for code in [
            gnutls_x509_crt_set_basic_constraints(host, 0, -1),
            gnutls_x509_crt_set_key_usage(host, UInt32(GNUTLS_KEY_DIGITAL_SIGNATURE)),
            gnutls_x509_crt_set_key_purpose_oid(host, GNUTLS_KP_TLS_WWW_SERVER, 0),
            gnutls_x509_crt_set_key_purpose_oid(host, GNUTLS_KP_TLS_WWW_CLIENT, 0),
        ] { try GnuTLS.check(code, "Cannot make a certificate for '\(request.name)'") }
        for name in request.hosts { try Self.addHost(name, to: host) }
        try GnuTLS.check(
            gnutls_x509_crt_sign2(host, certificate, self.key, GNUTLS_DIG_SHA256, 0),
            "Cannot sign a certificate"
        )
        return String(decoding: try Self.exportCertificate(host), as: UTF8.self)
    }

    // MARK: signatures

    /// Signs some bytes with the authority's key.
    public func sign(_ bytes: [UInt8]) throws -> [UInt8] {
        var signer: gnutls_privkey_t?
        try GnuTLS.check(gnutls_privkey_init(&signer), "Cannot sign")
        defer { gnutls_privkey_deinit(signer) }
        try GnuTLS.check(gnutls_privkey_import_x509(signer, key, 0), "Cannot sign")
        var signature = gnutls_datum_t()
        try Self.withDatum(bytes) {
            try GnuTLS.check(gnutls_privkey_sign_data(signer, GNUTLS_DIG_SHA256, 0, &$0, &signature), "Cannot sign")
        }
        defer { xd_gnutls_free(signature.data) }
        return Array(UnsafeBufferPointer(start: signature.data, count: Int(signature.size)))
    }

    /// Whether the authority of a certificate has signed some bytes.
    ///
    /// - Parameters:
    ///   - signature: what `sign(_:)` returned.
    ///   - bytes: the bytes.
    ///   - authority: the authority's certificate, PEM.
    /// - Throws: `CredentialError` when `authority` is no certificate.
    public static func verify(_ signature: [UInt8], of bytes: [UInt8], by authority: [UInt8]) throws -> Bool {
        guard let first = try Certificate.list(authority, what: "the authority's certificate").first else {
            return false
        }
        var key: gnutls_pubkey_t?
        try GnuTLS.check(gnutls_pubkey_init(&key), "Cannot verify a signature")
        defer { gnutls_pubkey_deinit(key) }
        try GnuTLS.check(gnutls_pubkey_import_x509(key, first.handle, 0), "Cannot verify a signature")
        var bits: UInt32 = 0
        let kind = gnutls_pk_algorithm_t(UInt32(bitPattern: gnutls_pubkey_get_pk_algorithm(key, &bits)))
        let algorithm = gnutls_pk_to_sign(kind, GNUTLS_DIG_SHA256)
        var isGood = false
        try withDatum(bytes) { data in
            try withDatum(signature) { sign in
                isGood = gnutls_pubkey_verify_data2(key, algorithm, 0, &data, &sign) >= 0
            }
        }
        return isGood
    }

    /// The SHA-256 fingerprint of the first certificate of a PEM text, as others print it: `SHA256:` and hexadecimal digits.
    ///
    /// - Throws: `CredentialError` when there is none.
    public static func fingerprint(of text: [UInt8]) throws -> String {
        guard let first = try Certificate.list(text, what: "a certificate").first else { return "" }
        var (size, digest) = (32, [UInt8](repeating: 0, count: 32))
        try GnuTLS.check(
            gnutls_x509_crt_get_fingerprint(first.handle, GNUTLS_DIG_SHA256, &digest, &size),
            "Cannot read a certificate"
        )
        return "SHA256:\(digest.hex)"
    }

    /// The distinguished name of the first certificate of a PEM text, as authorisation knows it.
    ///
    /// - Throws: `CredentialError` when there is none.
    public static func subject(of text: [UInt8]) throws -> String {
        try Certificate.list(text, what: "a certificate").first?.subject ?? ""
    }
}
