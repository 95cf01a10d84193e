internal import CGnuTLS

enum GnuTLS {
    /// Throws a `CredentialError` that starts with `what` when GnuTLS reports a failure.
    static func check(_ code: Int32, _ what: @autoclosure () -> String) throws {
        if code < 0 { throw CredentialError("\(what()): \(message(code))") }
    }

    static func message(_ code: Int32) -> String { String(cString: gnutls_strerror(code)) }

    /// The reasons of a certificate verification status, in QEMU's words where it has some.
    static func reasons(_ status: UInt32) -> [String] {
        let table: [(gnutls_certificate_status_t, String)] = [
            (GNUTLS_CERT_REVOKED, "it has been revoked"),
            (GNUTLS_CERT_SIGNER_NOT_FOUND, "it is not signed by the certificate authority in ca-cert.pem"),
            (GNUTLS_CERT_SIGNER_NOT_CA, "its issuer is not a certificate authority"),
            (GNUTLS_CERT_INSECURE_ALGORITHM, "it uses an insecure algorithm"),
            (GNUTLS_CERT_NOT_ACTIVATED, "it is not yet valid; check the clocks"),
            (GNUTLS_CERT_EXPIRED, "it has expired"),
            (GNUTLS_CERT_UNEXPECTED_OWNER, "it does not match the host name"),
            (GNUTLS_CERT_PURPOSE_MISMATCH, "its extended key usage does not allow this use"),
            (
                GNUTLS_CERT_SIGNATURE_FAILURE,
                "it is not signed by the certificate authority in ca-cert.pem, but by one of the same name"
            ),
            (GNUTLS_CERT_REVOCATION_DATA_SUPERSEDED, "the revocation list in ca-crl.pem is out of date"),
            (GNUTLS_CERT_REVOCATION_DATA_ISSUED_IN_FUTURE, "the revocation list in ca-crl.pem is from the future"),
            (GNUTLS_CERT_SIGNER_CONSTRAINTS_FAILURE, "it violates its issuer's constraints"),
        ]
        let found = table.filter { status & $0.0.rawValue != 0 }.map(\.1)
        return found.isEmpty ? ["it could not be verified"] : found
    }
}
