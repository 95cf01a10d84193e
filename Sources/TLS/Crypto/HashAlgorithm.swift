internal import CGcrypt

/// A hash function, by QEMU's name for it (`QCryptoHashAlgorithm`).
public enum HashAlgorithm: String, Sendable, CaseIterable {
    /// MD5 (RFC 1321). Broken; for old formats only.
    case md5
    /// SHA-1 (FIPS 180-4). Broken for signatures; the websocket handshake uses it.
    case sha1
    /// SHA-224 (FIPS 180-4).
    case sha224
    /// SHA-256 (FIPS 180-4).
    case sha256
    /// SHA-384 (FIPS 180-4).
    case sha384
    /// SHA-512 (FIPS 180-4).
    case sha512
    /// RIPEMD-160 (ISO/IEC 10118-3).
    case ripemd160
    /// SM3 (GB/T 32905-2016).
    case sm3

    var code: Int32 {
        switch self {
        case .md5: Int32(GCRY_MD_MD5.rawValue)
        case .sha1: Int32(GCRY_MD_SHA1.rawValue)
        case .sha224: Int32(GCRY_MD_SHA224.rawValue)
        case .sha256: Int32(GCRY_MD_SHA256.rawValue)
        case .sha384: Int32(GCRY_MD_SHA384.rawValue)
        case .sha512: Int32(GCRY_MD_SHA512.rawValue)
        case .ripemd160: Int32(GCRY_MD_RMD160.rawValue)
        case .sm3: Int32(GCRY_MD_SM3.rawValue)
        }
    }

    /// The algorithm of a name as QEMU writes it.
    ///
    /// - Throws: `CryptoError` that lists the names.
    public init(named name: String) throws {
        guard let algorithm = Self(rawValue: name) else {
            let known = Self.allCases.map(\.rawValue).joined(separator: ", ")
            throw CryptoError("Hash algorithm '\(name)' is not known; known are \(known)")
        }
        self = algorithm
    }

    /// Whether the system's library has the algorithm; in FIPS mode, for example, it has no MD5.
    public var isSupported: Bool {
        _ = Gcrypt.ready
        return xd_gcry_md_available(code) != 0
    }

    /// The length of a digest in bytes.
    public var digestLength: Int {
        switch self {
        case .md5: 16
        case .sha1, .ripemd160: 20
        case .sha224: 28
        case .sha256, .sm3: 32
        case .sha384: 48
        case .sha512: 64
        }
    }

    func requireSupport() throws {
        guard isSupported else {
            throw CryptoError("Hash algorithm '\(rawValue)' is not supported by this system's libgcrypt")
        }
    }

    /// Writes the digest of `bytes` to `digest`, which must have `digestLength` bytes. Copies and allocates nothing.
    ///
    /// - Precondition: the algorithm is supported; SHA-1 and the SHA-2 family always are.
    public func hash(_ bytes: UnsafeRawBufferPointer, into digest: UnsafeMutableRawPointer) {
        _ = Gcrypt.ready
        gcry_md_hash_buffer(code, digest, bytes.baseAddress, bytes.count)
    }

    /// The digest of `bytes`. The same precondition as for `hash(_:into:)`.
    public func hash(_ bytes: some Sequence<UInt8>) -> [UInt8] {
        [UInt8](unsafeUninitializedCapacity: digestLength) { digest, count in
            let target = digest.baseAddress!
            let done: Void? = bytes.withContiguousStorageIfAvailable { hash(UnsafeRawBufferPointer($0), into: target) }
            if done == nil { Array(bytes).withUnsafeBytes { hash($0, into: target) } }
            count = digestLength
        }
    }
}
