internal import Glibc

/// The GnuTLS priority strings that are used when none is given.
///
/// TLS 1.2 is the minimum. AES-GCM comes first when the processor has AES instructions: GnuTLS's own order for pre-shared
/// keys prefers ChaCha20, which is several times slower there. A server insists on its order, so that a peer with GnuTLS's
/// defaults gets AES-GCM too; a client's order counts with a server that leaves the choice to it.
public enum TLSPriority {
    /// Whether the processor has AES instructions.
    static let hasAES: Bool = {
        guard let file = fopen("/proc/cpuinfo", "re") else { return false }
        defer { fclose(file) }
        var line = [CChar](repeating: 0, count: 8192)
        while fgets(&line, Int32(line.count), file) != nil {
            let text = String(decoding: line.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
            if text.hasPrefix("flags") || text.hasPrefix("Features") {
                return text.split(whereSeparator: \.isWhitespace).contains("aes")
            }
        }
        return false
    }()

    /// The order of ciphers for a processor with or without AES instructions.
    static func ciphers(withAES: Bool) -> String {
        withAES ? "+AES-128-GCM:+AES-256-GCM:+CHACHA20-POLY1305" : "+CHACHA20-POLY1305:+AES-128-GCM:+AES-256-GCM"
    }

    /// For certificates.
    public static let base =
        "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2:-CIPHER-ALL:\(ciphers(withAES: hasAES)):%SERVER_PRECEDENCE"
    /// For pre-shared keys.
    public static let psk = base + pskSuffix
    /// For a key that is used once: each session has keys of its own, which nobody finds out who learns the shared one later.
    static let ephemeralPSK = base + ":-KX-ALL:+ECDHE-PSK"
    /// For no authentication at all, which TLS 1.3 does not have.
    public static let anon = base + ":-VERS-TLS1.3" + anonSuffix
    /// What QEMU appends to a given priority string for pre-shared keys.
    static let pskSuffix = ":+ECDHE-PSK:+DHE-PSK:+PSK"
    /// What QEMU appends to a given priority string for anonymous credentials, and its elliptic form.
    static let anonSuffix = ":+ANON-ECDH:+ANON-DH"
}
