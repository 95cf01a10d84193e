internal import CGnuTLS
internal import Glibc

/// A PEM file with certificates.
final class CertificateFile {
    let path: String
    private var certificates: [gnutls_x509_crt_t?] = []

    init(_ path: String) throws {
        self.path = path
        var bytes = try CredentialFile.contents(path)
        var list: UnsafeMutablePointer<gnutls_x509_crt_t?>?
        var count: UInt32 = 0
        let code = bytes.withUnsafeMutableBufferPointer { buffer in
            var datum = gnutls_datum_t(data: buffer.baseAddress, size: UInt32(buffer.count))
            return gnutls_x509_crt_list_import2(&list, &count, &datum, GNUTLS_X509_FMT_PEM, 0)
        }
        try GnuTLS.check(code, "Unable to import certificate \(path)")
        for index in 0..<Int(count) { certificates.append(list![index]) }
        xd_gnutls_free(list)
        if certificates.isEmpty { throw CredentialError("\(path) holds no certificate") }
    }

    deinit { for certificate in certificates { gnutls_x509_crt_deinit(certificate) } }

    /// Checks what a peer would reject: the dates, and that the authority signed the certificate.
    func checkSanity(_ endpoint: TLSEndpoint, authority: CertificateFile) throws {
        let now = time(nil)
        let leaf = certificates[0]
        let name = "\(endpoint.rawValue) certificate \(path)"
        if gnutls_x509_crt_get_expiration_time(leaf) < now {
            throw CredentialError("The \(name) has expired; issue a new one")
        }
        if gnutls_x509_crt_get_activation_time(leaf) > now {
            throw CredentialError("The \(name) is not yet active; check this host's clock")
        }
        var status: UInt32 = 0
        let code = gnutls_x509_crt_list_verify(
            certificates,
            UInt32(certificates.count),
            authority.certificates,
            UInt32(authority.certificates.count),
            nil,
            0,
            0,
            &status
        )
        try GnuTLS.check(code, "Cannot verify \(path)")
        if status & GNUTLS_CERT_INVALID.rawValue != 0 {
            throw CredentialError(
                "Our own certificate \(path) failed validation against \(authority.path): "
                    + GnuTLS.reasons(status).joined(separator: ", ")
            )
        }
    }
}
