internal import CGnuTLS
internal import Glibc

/// One result of checking a credential directory.
public struct CertificateFinding: Sendable, Equatable {
    /// How bad it is.
    public enum Severity: String, Sendable {
        /// The credentials cannot work; loading them fails.
        case error
        /// They work now or with some peers; somebody should look at it.
        case warning
    }

    /// How bad it is.
    public let severity: Severity
    /// The file it is about.
    public let file: String
    /// The field of the certificate, in the words of RFC 5280, or a property of the file.
    public let field: String
    /// What is wrong, beginning as QEMU's message does, and what to do.
    public let message: String
}

/// The sanity checks of certificates, QEMU's `sanity-check`: what a peer would reject is found before it connects.
///
/// Only the certificates that the chain to the authority goes through are judged; others in `ca-cert.pem` yield warnings.
struct CertificateCheck {
    /// The file with our certificate and, after it, intermediate authorities; nil for a client that has none.
    let own: (path: String, chain: [Certificate])?
    let authorities: (path: String, list: [Certificate])
    let revocations: [UInt8]?
    let endpoint: TLSEndpoint
    let now = time(nil)

    private static let reissue = "issue a new one, for example with 'crossdock pki issue'"
    private static let warningTime = 30 * 86400

    /// Everything that is wrong, errors and warnings, in QEMU's order: our certificate first, then the authorities on its
    /// chain, then the chain as a whole.
    func findings() throws -> [CertificateFinding] {
        var result: [CertificateFinding] = []
        guard let own else {
            // Without a certificate of our own, each authority may be the server's: one good one is enough.
            let all = authorities.list.map { checkAuthority($0, authorities.path) }
            if all.allSatisfy({ $0.contains { $0.severity == .error } }) { return all.flatMap { $0 } }
            return all.flatMap { $0 }.map(Self.asWarning)
        }
        let leaf = own.chain[0]
        result += checkTimes(leaf, own.path, endpoint.rawValue)
        result += checkLeaf(leaf, own.path)
        var chain = [leaf]
        while !chain.last!.isIssued(by: chain.last!), chain.count < 16 {
            guard let (issuer, path) = issuer(of: chain.last!) else { break }
            result += checkAuthority(issuer, path)
            chain.append(issuer)
        }
        for other in authorities.list where !chain.contains(where: { $0.equals(other) }) {
            result += checkAuthority(other, authorities.path).map(Self.asWarning)
        }
        if !result.contains(where: { $0.severity == .error }) { result += try checkSignatures(chain) }
        return result
    }

    /// The issuer that is valid now when several have the same name, as after a renewal.
    private func issuer(of certificate: Certificate) -> (Certificate, String)? {
        let candidates =
            (own?.chain.dropFirst().map { ($0, own!.path) } ?? []) + authorities.list.map { ($0, authorities.path) }
        let matching = candidates.filter { certificate.isIssued(by: $0.0) }
        return matching.first { $0.0.notBefore <= now && now <= $0.0.notAfter } ?? matching.first
    }

    private static func asWarning(_ finding: CertificateFinding) -> CertificateFinding {
        CertificateFinding(
            severity: .warning,
            file: finding.file,
            field: finding.field,
            message: "\(finding.message) (not needed by our own certificate)"
        )
    }

    private func checkTimes(_ certificate: Certificate, _ path: String, _ kind: String) -> [CertificateFinding] {
        if certificate.notAfter < now {
            return [
                .init(
                    severity: .error,
                    file: path,
                    field: "notAfter",
                    message: "The \(kind) certificate \(path) has expired on \(Self.date(certificate.notAfter)); "
                        + Self.reissue
                )
            ]
        }
        if certificate.notBefore > now {
            return [
                .init(
                    severity: .error,
                    file: path,
                    field: "notBefore",
                    message:
                        "The \(kind) certificate \(path) is not yet active before \(Self.date(certificate.notBefore)); "
                        + "check this host's clock"
                )
            ]
        }
        if certificate.notAfter - now < Self.warningTime {
            let days = (certificate.notAfter - now) / 86400
            return [
                .init(
                    severity: .warning,
                    file: path,
                    field: "notAfter",
                    message: "The \(kind) certificate \(path) expires in \(days) days, on "
                        + "\(Self.date(certificate.notAfter)); \(Self.reissue)"
                )
            ]
        }
        return []
    }

    private func checkLeaf(_ leaf: Certificate, _ path: String) -> [CertificateFinding] {
        var result: [CertificateFinding] = []
        if leaf.isAuthority == true {
            result.append(
                .init(
                    severity: .error,
                    file: path,
                    field: "basicConstraints",
                    message: "The certificate \(path) basic constraints show a CA, but we need one for a "
                        + "\(endpoint.rawValue); \(Self.reissue)"
                )
            )
        }
        if let usage = leaf.keyUsage, usage.bits & UInt32(GNUTLS_KEY_DIGITAL_SIGNATURE) == 0 {
            // keyEncipherment is not asked for: only RSA key exchange without forward secrecy uses it.
            result.append(
                .init(
                    severity: usage.isCritical ? .error : .warning,
                    file: path,
                    field: "keyUsage",
                    message: "Certificate \(path) usage does not permit digital signature; " + Self.reissue
                )
            )
        }
        let oid = endpoint == .server ? GNUTLS_KP_TLS_WWW_SERVER : GNUTLS_KP_TLS_WWW_CLIENT
        let name = endpoint == .server ? "serverAuth" : "clientAuth"
        if let purposes = leaf.purposes, !purposes.oids.contains(oid), !purposes.oids.contains(GNUTLS_KP_ANY) {
            result.append(
                .init(
                    severity: purposes.isCritical ? .error : .warning,
                    file: path,
                    field: "extKeyUsage",
                    message: "Certificate \(path) purpose does not allow use with a TLS \(endpoint.rawValue): "
                        + "\(name) is missing; \(Self.reissue)"
                )
            )
        }
        return result
    }

    private func checkAuthority(_ certificate: Certificate, _ path: String) -> [CertificateFinding] {
        var result = checkTimes(certificate, path, "CA")
        switch certificate.isAuthority {
        case true?: break
        case false?:
            result.append(
                .init(
                    severity: .error,
                    file: path,
                    field: "basicConstraints",
                    message:
                        "The certificate \(path) basic constraints do not show a CA: '\(certificate.subject)' is a host's "
                        + "certificate; put the authority's certificate there"
                )
            )
        case nil:
            result.append(
                .init(
                    severity: .error,
                    file: path,
                    field: "basicConstraints",
                    message:
                        "The certificate \(path) is missing basic constraints for a CA; make one with 'crossdock pki init'"
                )
            )
        }
        if let usage = certificate.keyUsage, usage.bits & UInt32(GNUTLS_KEY_KEY_CERT_SIGN) == 0 {
            result.append(
                .init(
                    severity: usage.isCritical ? .error : .warning,
                    file: path,
                    field: "keyUsage",
                    message: "Certificate \(path) usage does not permit certificate signing; "
                        + "make one with 'crossdock pki init'"
                )
            )
        }
        return result
    }

    private func checkSignatures(_ chain: [Certificate]) throws -> [CertificateFinding] {
        guard let own else { return [] }
        // The list does not own what is added to it one by one, and must be gone before what it refers to.
        var lists: UnsafeMutablePointer<gnutls_x509_crl_t?>?
        var count: UInt32 = 0
        defer {
            for index in 0..<Int(count) { gnutls_x509_crl_deinit(lists![index]) }
            xd_gnutls_free(lists)
        }
        var trust: gnutls_x509_trust_list_t?
        try GnuTLS.check(gnutls_x509_trust_list_init(&trust, 0), "Cannot verify \(own.path)")
        defer { gnutls_x509_trust_list_deinit(trust, 0) }
        let anchors = authorities.list.map { Optional($0.handle) }
        gnutls_x509_trust_list_add_cas(trust, anchors, UInt32(anchors.count), 0)
        if var revocations {
            try revocations.withUnsafeMutableBufferPointer { buffer in
                var datum = gnutls_datum_t(data: buffer.baseAddress, size: UInt32(buffer.count))
                let code = gnutls_x509_crl_list_import2(&lists, &count, &datum, GNUTLS_X509_FMT_PEM, 0)
                try GnuTLS.check(code, "Cannot load CRL")
            }
            gnutls_x509_trust_list_add_crls(trust, lists, count, 0, 0)
        }
        var status: UInt32 = 0
        // The file's own intermediates, then those of ca-cert.pem, as our peers receive or know them.
        var presented = own.chain.map { Optional($0.handle) }
        try GnuTLS.check(
            gnutls_x509_trust_list_verify_crt(trust, &presented, UInt32(presented.count), 0, &status, nil),
            "Cannot verify \(own.path)"
        )
        guard status & GNUTLS_CERT_INVALID.rawValue != 0 else { return [] }
        var reasons = GnuTLS.reasons(status).joined(separator: ", ")
        if status & GNUTLS_CERT_SIGNER_NOT_FOUND.rawValue != 0 {
            let last = chain.last!
            reasons += "; '\(last.subject)' was issued by '\(last.issuer)', which is not there"
        }
        return [
            .init(
                severity: .error,
                file: own.path,
                field: "signature",
                message: "Our own certificate \(own.path) failed validation against \(authorities.path): \(reasons)"
            )
        ]
    }

    static func date(_ time: time_t) -> String {
        var time = time
        var parts = tm()
        gmtime_r(&time, &parts)
        var text = [CChar](repeating: 0, count: 32)
        strftime(&text, text.count, "%Y-%m-%d", &parts)
        return String(decoding: text.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }
}
