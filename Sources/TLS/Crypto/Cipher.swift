internal import CGcrypt

/// A block cipher, by QEMU's name for it (`QCryptoCipherAlgorithm`).
public enum CipherAlgorithm: String, Sendable, CaseIterable {
    /// AES with a key of 128 bits (FIPS 197).
    case aes128 = "aes-128"
    /// AES with a key of 192 bits.
    case aes192 = "aes-192"
    /// AES with a key of 256 bits.
    case aes256 = "aes-256"
    /// DES (FIPS 46-3). Broken; VNC's password authentication uses it.
    case des
    /// Triple DES with three keys (FIPS 46-3).
    case tripleDES = "3des"
    /// CAST5 with a key of 128 bits (RFC 2144).
    case cast5 = "cast5-128"
    /// Serpent with a key of 128 bits.
    case serpent128 = "serpent-128"
    /// Serpent with a key of 192 bits.
    case serpent192 = "serpent-192"
    /// Serpent with a key of 256 bits.
    case serpent256 = "serpent-256"
    /// Twofish with a key of 128 bits.
    case twofish128 = "twofish-128"
    /// Twofish with a key of 256 bits.
    case twofish256 = "twofish-256"

    var code: Int32 {
        let algorithm =
            switch self {
            case .aes128: GCRY_CIPHER_AES
            case .aes192: GCRY_CIPHER_AES192
            case .aes256: GCRY_CIPHER_AES256
            case .des: GCRY_CIPHER_DES
            case .tripleDES: GCRY_CIPHER_3DES
            case .cast5: GCRY_CIPHER_CAST5
            case .serpent128: GCRY_CIPHER_SERPENT128
            case .serpent192: GCRY_CIPHER_SERPENT192
            case .serpent256: GCRY_CIPHER_SERPENT256
            case .twofish128: GCRY_CIPHER_TWOFISH128
            case .twofish256: GCRY_CIPHER_TWOFISH
            }
        return Int32(algorithm.rawValue)
    }

    /// The algorithm of a name as QEMU writes it.
    ///
    /// - Throws: `CryptoError` that lists the names. libgcrypt has no Twofish with 192 bits, so "twofish-192" has none.
    public init(named name: String) throws {
        guard let algorithm = Self(rawValue: name) else {
            let known = Self.allCases.map(\.rawValue).joined(separator: ", ")
            throw CryptoError("Cipher '\(name)' is not known; known are \(known)")
        }
        self = algorithm
    }

    /// The length of a block in bytes.
    public var blockLength: Int {
        switch self {
        case .des, .tripleDES, .cast5: 8
        default: 16
        }
    }

    /// The length of a key in bytes; XTS uses two keys, one after the other.
    public var keyLength: Int {
        switch self {
        case .des: 8
        case .aes128, .cast5, .serpent128, .twofish128: 16
        case .aes192, .tripleDES, .serpent192: 24
        case .aes256, .serpent256, .twofish256: 32
        }
    }

    /// Whether the system's library has the cipher in this mode.
    public func isSupported(in mode: CipherMode) -> Bool {
        _ = Gcrypt.ready
        if mode == .xts, blockLength != 16 || keyLength == 24 { return false }
        return xd_gcry_cipher_available(code) != 0
    }
}

/// How a cipher treats more than one block (NIST SP 800-38A, IEEE 1619).
public enum CipherMode: String, Sendable, CaseIterable {
    /// Each block on its own. Reveals equal blocks; for old formats only.
    case ecb
    /// Cipher block chaining.
    case cbc
    /// The mode of disk encryption, with two keys and a sector number as the initialisation vector.
    case xts
    /// Counter mode: a stream, of any length.
    case ctr

    var code: Int32 {
        switch self {
        case .ecb: Int32(GCRY_CIPHER_MODE_ECB.rawValue)
        case .cbc: Int32(GCRY_CIPHER_MODE_CBC.rawValue)
        case .xts: Int32(GCRY_CIPHER_MODE_XTS.rawValue)
        case .ctr: Int32(GCRY_CIPHER_MODE_CTR.rawValue)
        }
    }
}

/// A cipher with a key. Its key is wiped from memory with it.
///
/// Not thread-safe: the chaining state moves on with each call, until `setIV`.
public final class Cipher {
    /// The algorithm.
    public let algorithm: CipherAlgorithm
    /// The mode.
    public let mode: CipherMode
    private let handle: gcry_cipher_hd_t

    /// Makes a cipher.
    ///
    /// - Parameters:
    ///   - algorithm: the block cipher.
    ///   - mode: how blocks are chained.
    ///   - key: `keyLength` bytes, twice as many in XTS.
    /// - Throws: `CryptoError` when the library does not have the cipher in this mode, or the key has another length.
    public init(_ algorithm: CipherAlgorithm, _ mode: CipherMode, key: UnsafeRawBufferPointer) throws {
        let name = "\(algorithm.rawValue) in mode \(mode.rawValue)"
        guard algorithm.isSupported(in: mode) else {
            throw CryptoError("Cipher \(name) is not supported by this system's libgcrypt")
        }
        let expected = algorithm.keyLength * (mode == .xts ? 2 : 1)
        guard key.count == expected else {
            throw CryptoError("Cipher \(name) needs a key of \(expected) bytes, not \(key.count)")
        }
        if mode == .xts, key.prefix(expected / 2).elementsEqual(key.suffix(expected / 2)) {
            // IEEE 1619 requires different keys; with equal ones the mode is weaker than it looks.
            throw CryptoError("Cipher \(name) needs two different keys")
        }
        self.algorithm = algorithm
        self.mode = mode
        var handle: gcry_cipher_hd_t?
        try Gcrypt.check(gcry_cipher_open(&handle, algorithm.code, mode.code, 0), "Cannot start cipher \(name)")
        self.handle = handle!
        if algorithm == .des || algorithm == .tripleDES { _ = xd_gcry_allow_weak_key(self.handle) }
        let code = gcry_cipher_setkey(self.handle, key.baseAddress, key.count)
        // A weak key of DES is set and reported; VNC passwords may well be weak keys.
        if gcry_err_code(code) != GPG_ERR_WEAK_KEY { try Gcrypt.check(code, "Cannot use the key of cipher \(name)") }
    }

    /// Makes a cipher with a key from an array.
    public static func make(_ algorithm: CipherAlgorithm, _ mode: CipherMode, key: [UInt8]) throws -> Cipher {
        try key.withUnsafeBytes { try Cipher(algorithm, mode, key: $0) }
    }

    deinit { gcry_cipher_close(handle) }

    /// Sets the initialisation vector, the sector number of XTS or the first counter of CTR.
    ///
    /// - Throws: `CryptoError` unless it has the length of a block.
    public func setIV(_ iv: [UInt8]) throws {
        guard mode != .ecb else { throw CryptoError("Mode ecb has no initialisation vector") }
        guard iv.count == algorithm.blockLength else {
            throw CryptoError("IV should be \(algorithm.blockLength) bytes in length not \(iv.count)")
        }
        try Gcrypt.check(
            mode == .ctr ? gcry_cipher_setctr(handle, iv, iv.count) : gcry_cipher_setiv(handle, iv, iv.count),
            "Cannot set the initialisation vector"
        )
    }

    /// Encrypts in place.
    ///
    /// - Throws: `CryptoError` when the length is no multiple of the block length; CTR takes any length.
    public func encrypt(_ bytes: UnsafeMutableRawBufferPointer) throws {
        try checkLength(bytes.count)
        try Gcrypt.check(gcry_cipher_encrypt(handle, bytes.baseAddress, bytes.count, nil, 0), "Cannot encrypt")
    }

    /// Decrypts in place.
    ///
    /// - Throws: `CryptoError` when the length is no multiple of the block length; CTR takes any length.
    public func decrypt(_ bytes: UnsafeMutableRawBufferPointer) throws {
        try checkLength(bytes.count)
        try Gcrypt.check(gcry_cipher_decrypt(handle, bytes.baseAddress, bytes.count, nil, 0), "Cannot decrypt")
    }

    /// The ciphertext of an array.
    public func encrypt(_ bytes: [UInt8]) throws -> [UInt8] {
        var result = bytes
        try result.withUnsafeMutableBytes { try encrypt($0) }
        return result
    }

    /// The plaintext of an array.
    public func decrypt(_ bytes: [UInt8]) throws -> [UInt8] {
        var result = bytes
        try result.withUnsafeMutableBytes { try decrypt($0) }
        return result
    }

    private func checkLength(_ count: Int) throws {
        guard mode == .ctr || count % algorithm.blockLength == 0 else {
            throw CryptoError("Length \(count) must be a multiple of the block length \(algorithm.blockLength)")
        }
    }
}
