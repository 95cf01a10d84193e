internal import CGnuTLS
internal import Glibc
internal import IO

/// A certificate authority that issues host certificates in QEMU's directory layout, ECDSA P-256.
public final class CertificateAuthority {
    /// What a certificate is for and how long it is good.
    public struct Request: Sendable {
        /// The common name.
        public var name: String
        /// DNS names and IP addresses for the subject alternative name.
        public var hosts: [String]
        /// When it starts to be valid, in seconds from now; negative is the past.
        public var starts: Int
        /// When it ends to be valid, in seconds from now.
        public var ends: Int

        /// Makes a request; the default validity is from an hour ago, for clocks that differ, to 365 days from now.
        public init(name: String, hosts: [String], starts: Int = -3600, ends: Int = 365 * 86400) {
            self.name = name
            self.hosts = hosts
            self.starts = starts
            self.ends = ends
        }
    }

    let certificate: gnutls_x509_crt_t
    let key: gnutls_x509_privkey_t

    /// Makes a new authority, good for ten years.
    public init(name: String) throws {
        key = try Self.makeKey()
        certificate = try Self.makeCertificate(key, name, starts: -3600, ends: 3650 * 86400)
        try GnuTLS.check(gnutls_x509_crt_set_basic_constraints(certificate, 1, -1), "Cannot make a certificate")
        try GnuTLS.check(
            gnutls_x509_crt_set_key_usage(certificate, UInt32(GNUTLS_KEY_KEY_CERT_SIGN | GNUTLS_KEY_CRL_SIGN)),
            "Cannot make a certificate"
        )
        try GnuTLS.check(
            gnutls_x509_crt_sign2(certificate, certificate, key, GNUTLS_DIG_SHA256, 0),
            "Cannot sign a certificate"
        )
    }

    /// Loads the authority of a directory: `ca-cert.pem` and `ca-key.pem`.
    public init(loading directory: String) throws {
        var certificate: gnutls_x509_crt_t?
        var key: gnutls_x509_privkey_t?
        try GnuTLS.check(gnutls_x509_crt_init(&certificate), "Cannot load a certificate")
        try GnuTLS.check(gnutls_x509_privkey_init(&key), "Cannot load a key")
        self.certificate = certificate!
        self.key = key!
        guard DurableFile.exists("\(directory)/ca-key.pem") else {
            throw CredentialError(
                "There is no ca-key.pem in \(directory), so it is no authority that issues certificates; the authority's directory comes "
                    + "first, as 'crossdock pki init' has made it"
            )
        }
        let certificatePath = try CredentialFile.require(directory, "ca-cert.pem")
        let keyPath = try CredentialFile.require(directory, "ca-key.pem")
        try Self.withDatum(CredentialFile.contents(certificatePath)) {
            try GnuTLS.check(
                gnutls_x509_crt_import(certificate, &$0, GNUTLS_X509_FMT_PEM),
                "Cannot load CA certificate '\(certificatePath)'"
            )
        }
        try Self.withDatum(CredentialFile.contents(keyPath)) {
            try GnuTLS.check(
                gnutls_x509_privkey_import(key, &$0, GNUTLS_X509_FMT_PEM),
                "Cannot load CA key '\(keyPath)'"
            )
        }
    }

    deinit {
        gnutls_x509_crt_deinit(certificate)
        gnutls_x509_privkey_deinit(key)
    }

    /// Writes `ca-cert.pem` and `ca-key.pem`; neither may exist.
    public func save(to directory: String) throws {
        try Self.write(Self.exportCertificate(certificate), to: "\(directory)/ca-cert.pem", mode: 0o644)
        try Self.write(Self.exportKey(key), to: "\(directory)/ca-key.pem", mode: 0o600)
    }

    /// Writes a host's directory: `ca-cert.pem`, and certificate and key for both ends, so that a host can be source and
    /// destination. No file may exist.
    public func issue(_ request: Request, to directory: String) throws {
        try Self.write(Self.exportCertificate(certificate), to: "\(directory)/ca-cert.pem", mode: 0o644)
        for endpoint in [TLSEndpoint.server, .client] {
            let hostKey = try Self.makeKey()
            defer { gnutls_x509_privkey_deinit(hostKey) }
            let host = try Self.makeCertificate(hostKey, request.name, starts: request.starts, ends: request.ends)
            defer { gnutls_x509_crt_deinit(host) }
            try GnuTLS.check(gnutls_x509_crt_set_basic_constraints(host, 0, -1), "Cannot make a certificate")
            try GnuTLS.check(
                gnutls_x509_crt_set_key_usage(host, UInt32(GNUTLS_KEY_DIGITAL_SIGNATURE)),
                "Cannot make a certificate"
            )
            let purpose = endpoint == .server ? GNUTLS_KP_TLS_WWW_SERVER : GNUTLS_KP_TLS_WWW_CLIENT
            try GnuTLS.check(gnutls_x509_crt_set_key_purpose_oid(host, purpose, 0), "Cannot make a certificate")
            for name in request.hosts { try Self.addHost(name, to: host) }
            try GnuTLS.check(
                gnutls_x509_crt_sign2(host, certificate, key, GNUTLS_DIG_SHA256, 0),
                "Cannot sign a certificate"
            )
            try Self.write(Self.exportCertificate(host), to: "\(directory)/\(endpoint.rawValue)-cert.pem", mode: 0o644)
            try Self.write(Self.exportKey(hostKey), to: "\(directory)/\(endpoint.rawValue)-key.pem", mode: 0o600)
        }
    }

    static func addHost(_ name: String, to certificate: gnutls_x509_crt_t) throws {
        var v4 = in_addr()
        var v6 = in6_addr()
        let code: Int32
        if inet_pton(AF_INET, name, &v4) == 1 {
            code = gnutls_x509_crt_set_subject_alt_name(certificate, GNUTLS_SAN_IPADDRESS, &v4, 4, 1)
        } else if inet_pton(AF_INET6, name, &v6) == 1 {
            code = gnutls_x509_crt_set_subject_alt_name(certificate, GNUTLS_SAN_IPADDRESS, &v6, 16, 1)
        } else {
            code = gnutls_x509_crt_set_subject_alt_name(
                certificate,
                GNUTLS_SAN_DNSNAME,
                name,
                UInt32(name.utf8.count),
                1
            )
        }
        try GnuTLS.check(code, "Cannot put the name '\(name)' into a certificate")
    }

    static func makeKey() throws -> gnutls_x509_privkey_t {
        var key: gnutls_x509_privkey_t?
        try GnuTLS.check(gnutls_x509_privkey_init(&key), "Cannot make a key")
        // GNUTLS_CURVE_TO_BITS is a macro with arithmetic that Swift does not import.
        let bits = UInt32(bitPattern: Int32.min) | UInt32(GNUTLS_ECC_CURVE_SECP256R1.rawValue)
        try GnuTLS.check(gnutls_x509_privkey_generate(key, GNUTLS_PK_ECDSA, bits, 0), "Cannot make a key")
        return key!
    }

    private static func makeCertificate(
        _ key: gnutls_x509_privkey_t,
        _ name: String,
        starts: Int,
        ends: Int
    ) throws -> gnutls_x509_crt_t {
        try makeCertificate(name, starts: starts, ends: ends) { gnutls_x509_crt_set_key($0, key) }
    }

    /// A certificate that is not signed yet, with the key that `setKey` gives it.
    static func makeCertificate(
        _ name: String,
        starts: Int,
        ends: Int,
        setKey: (gnutls_x509_crt_t) -> Int32
    ) throws -> gnutls_x509_crt_t {
        var certificate: gnutls_x509_crt_t?
        try GnuTLS.check(gnutls_x509_crt_init(&certificate), "Cannot make a certificate")
        let now = time(nil)
        var serial = [UInt8](repeating: 0, count: 16)
        gnutls_rnd(GNUTLS_RND_NONCE, &serial, serial.count)
        serial[0] &= 0x7f
        for code in [
            gnutls_x509_crt_set_version(certificate, 3),
            gnutls_x509_crt_set_serial(certificate, serial, serial.count),
            gnutls_x509_crt_set_activation_time(certificate, now + starts),
            gnutls_x509_crt_set_expiration_time(certificate, now + ends),
            setKey(certificate!),
            gnutls_x509_crt_set_dn_by_oid(certificate, GNUTLS_OID_X520_COMMON_NAME, 0, name, UInt32(name.utf8.count)),
        ] { try GnuTLS.check(code, "Cannot make a certificate for '\(name)'") }
        return certificate!
    }

    static func withDatum(_ bytes: [UInt8], _ body: (inout gnutls_datum_t) throws -> Void) throws {
        var bytes = bytes
        try bytes.withUnsafeMutableBufferPointer { buffer in
            var datum = gnutls_datum_t(data: buffer.baseAddress, size: UInt32(buffer.count))
            try body(&datum)
            gnutls_memset(buffer.baseAddress, 0, buffer.count)
        }
    }

    static func exportCertificate(_ certificate: gnutls_x509_crt_t) throws -> [UInt8] {
        var datum = gnutls_datum_t()
        try GnuTLS.check(
            gnutls_x509_crt_export2(certificate, GNUTLS_X509_FMT_PEM, &datum),
            "Cannot write a certificate"
        )
        defer { xd_gnutls_free(datum.data) }
        return Array(UnsafeBufferPointer(start: datum.data, count: Int(datum.size)))
    }

    static func exportKey(_ key: gnutls_x509_privkey_t) throws -> [UInt8] {
        var datum = gnutls_datum_t()
        try GnuTLS.check(
            gnutls_x509_privkey_export2_pkcs8(key, GNUTLS_X509_FMT_PEM, nil, 0, &datum),
            "Cannot write a key"
        )
        defer {
            gnutls_memset(datum.data, 0, Int(datum.size))
            xd_gnutls_free(datum.data)
        }
        return Array(UnsafeBufferPointer(start: datum.data, count: Int(datum.size)))
    }

    static func write(_ bytes: [UInt8], to path: String, mode: mode_t) throws {
        let fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode)
        guard fd >= 0 else {
            let hint = errno == EEXIST ? "; nothing that is there is overwritten, name a new directory" : ""
            throw CredentialError("Cannot create \(path): \(String(cString: strerror(errno)))\(hint)")
        }
        defer { close(fd) }
        let written = bytes.withUnsafeBytes { Glibc.write(fd, $0.baseAddress, $0.count) }
        guard written == bytes.count, fsync(fd) == 0 else {
            throw CredentialError("Cannot write \(path): \(String(cString: strerror(errno)))")
        }
    }
}
