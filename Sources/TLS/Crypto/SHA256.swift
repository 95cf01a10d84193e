internal import CGcrypt

/// Initialises libgcrypt once for the process.
enum Gcrypt {
    static let ready: Void = {
        _ = gcry_check_version(nil)
        _ = xd_gcry_disable_secure_memory()
        _ = xd_gcry_finish_initialization()
    }()
}

/// SHA-256 (FIPS 180-4) by libgcrypt.
public enum SHA256 {
    /// The length of a digest in bytes.
    public static let length = 32

    /// Writes the digest of `bytes` to `digest`, which must have 32 bytes.
    public static func hash(_ bytes: UnsafeRawBufferPointer, into digest: UnsafeMutableRawPointer) {
        _ = Gcrypt.ready
        gcry_md_hash_buffer(Int32(GCRY_MD_SHA256.rawValue), digest, bytes.baseAddress, bytes.count)
    }

    /// The digest of `bytes`.
    public static func hash(_ bytes: some Sequence<UInt8>) -> [UInt8] {
        let input = Array(bytes)
        return [UInt8](unsafeUninitializedCapacity: length) { digest, count in
            input.withUnsafeBytes { hash($0, into: digest.baseAddress!) }
            count = length
        }
    }
}

extension Sequence<UInt8> {
    /// The bytes in lower-case hexadecimal.
    public var hex: String {
        let digits = Array("0123456789abcdef".utf8)
        var text: [UInt8] = []
        for byte in self {
            text.append(digits[Int(byte >> 4)])
            text.append(digits[Int(byte & 15)])
        }
        return String(decoding: text, as: UTF8.self)
    }
}
