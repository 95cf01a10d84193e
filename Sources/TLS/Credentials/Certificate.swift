internal import CGnuTLS
internal import Glibc
internal import IO

/// One parsed X.509 certificate, and what a check has to know about it.
final class Certificate {
    let handle: gnutls_x509_crt_t

    /// Takes over a GnuTLS certificate.
    init(adopting handle: gnutls_x509_crt_t) { self.handle = handle }

    deinit { gnutls_x509_crt_deinit(handle) }

    /// The certificates of a PEM file, in their order.
    static func list(_ contents: [UInt8], what: String) throws -> [Certificate] {
        var contents = contents
        var list: UnsafeMutablePointer<gnutls_x509_crt_t?>?
        var count: UInt32 = 0
        let code = contents.withUnsafeMutableBufferPointer { buffer in
            var datum = gnutls_datum_t(data: buffer.baseAddress, size: UInt32(buffer.count))
            return gnutls_x509_crt_list_import2(&list, &count, &datum, GNUTLS_X509_FMT_PEM, 0)
        }
        try GnuTLS.check(code, "Unable to import \(what)")
        defer { xd_gnutls_free(list) }
        let certificates = (0..<Int(count)).compactMap { list![$0].map { Certificate(adopting: $0) } }
        if certificates.isEmpty { throw CredentialError("Unable to import \(what): it holds no certificate") }
        return certificates
    }

    var notBefore: time_t { gnutls_x509_crt_get_activation_time(handle) }
    var notAfter: time_t { gnutls_x509_crt_get_expiration_time(handle) }

    /// The CA bit; nil when the certificate has no basic constraints.
    var isAuthority: Bool? {
        let code = gnutls_x509_crt_get_basic_constraints(handle, nil, nil, nil)
        if code == GNUTLS_E_REQUESTED_DATA_NOT_AVAILABLE { return nil }
        return code > 0
    }

    /// The key usage bits and whether they are critical; nil when the certificate does not say.
    var keyUsage: (bits: UInt32, isCritical: Bool)? {
        var bits: UInt32 = 0
        var critical: UInt32 = 0
        guard gnutls_x509_crt_get_key_usage(handle, &bits, &critical) == 0 else { return nil }
        return (bits, critical != 0)
    }

    /// The extended key usage and whether it is critical; nil when the certificate does not say.
    var purposes: (oids: [String], isCritical: Bool)? {
        var oids: [String] = []
        var isCritical = false
        while oids.count < 64 {
            var size = 256
            var text = [CChar](repeating: 0, count: size)
            var critical: UInt32 = 0
            guard
                gnutls_x509_crt_get_key_purpose_oid(handle, UInt32(oids.count), &text, &size, &critical) == 0
            else { break }
            oids.append(Self.string(text))
            isCritical = critical != 0
        }
        return oids.isEmpty ? nil : (oids, isCritical)
    }

    /// The distinguished name, in QEMU's form.
    var subject: String { Self.name { gnutls_x509_crt_get_dn(handle, $0, $1) } }
    /// The issuer's distinguished name.
    var issuer: String { Self.name { gnutls_x509_crt_get_issuer_dn(handle, $0, $1) } }

    /// The subject alternative names, each with its kind: `DNS:host`, `IP:192.0.2.1`, `URI:...`, `EMAIL:...`.
    var alternativeNames: [String] {
        var names: [String] = []
        while names.count < 4096 {
            var size = 1024
            var bytes = [UInt8](repeating: 0, count: size)
            var critical: UInt32 = 0
            var code = gnutls_x509_crt_get_subject_alt_name(handle, UInt32(names.count), &bytes, &size, &critical)
            if code == GNUTLS_E_SHORT_MEMORY_BUFFER, size <= 1 << 20 {
                bytes = [UInt8](repeating: 0, count: size + 1)
                size += 1
                code = gnutls_x509_crt_get_subject_alt_name(handle, UInt32(names.count), &bytes, &size, &critical)
            }
            if code == GNUTLS_E_REQUESTED_DATA_NOT_AVAILABLE { break }
            guard code >= 0 else {
                // It counts, so that those behind it are seen.
                names.append("OTHER:")
                continue
            }
            let value = bytes.prefix(size)
            switch UInt32(code) {
            case GNUTLS_SAN_DNSNAME.rawValue: names.append("DNS:\(String(decoding: value, as: UTF8.self))")
            case GNUTLS_SAN_URI.rawValue: names.append("URI:\(String(decoding: value, as: UTF8.self))")
            case GNUTLS_SAN_RFC822NAME.rawValue: names.append("EMAIL:\(String(decoding: value, as: UTF8.self))")
            case GNUTLS_SAN_IPADDRESS.rawValue: names.append("IP:\(Self.address(Array(value)))")
            default: names.append("OTHER:\(value.hex)")
            }
        }
        return names
    }

    /// Whether `issuer` may have issued this certificate, by names and key identifiers.
    func isIssued(by issuer: Certificate) -> Bool { gnutls_x509_crt_check_issuer(handle, issuer.handle) != 0 }

    /// Whether two certificates are the same, byte for byte.
    func equals(_ other: Certificate) -> Bool { gnutls_x509_crt_equals(handle, other.handle) != 0 }

    private static func address(_ bytes: [UInt8]) -> String {
        var text = [CChar](repeating: 0, count: 64)
        guard bytes.count == 4 || bytes.count == 16,
            inet_ntop(bytes.count == 4 ? AF_INET : AF_INET6, bytes, &text, 64) != nil
        else { return bytes.hex }
        return string(text)
    }

    private static func name(
        _ read: (UnsafeMutablePointer<CChar>, UnsafeMutablePointer<Int>) -> Int32
    ) -> String {
        var size = 4096
        var text = [CChar](repeating: 0, count: size)
        var code = read(&text, &size)
        if code == GNUTLS_E_SHORT_MEMORY_BUFFER, size <= 1 << 20 {
            text = [CChar](repeating: 0, count: size + 1)
            size += 1
            code = read(&text, &size)
        }
        return code == 0 ? string(text) : ""
    }

    private static func string(_ text: [CChar]) -> String {
        String(decoding: text.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }
}
