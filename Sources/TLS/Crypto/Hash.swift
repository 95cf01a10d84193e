internal import CGcrypt
public import Glibc

/// A hash or, with a key, a message authentication code (HMAC, RFC 2104) that is computed piece by piece.
///
/// Nothing is copied on the way in. A key is wiped from memory with the object.
public struct Hash: ~Copyable {
    /// The hash function.
    public let algorithm: HashAlgorithm
    private let handle: gcry_md_hd_t

    /// Starts a hash.
    ///
    /// - Throws: `CryptoError` when the library does not have the algorithm.
    public init(_ algorithm: HashAlgorithm) throws {
        handle = try Self.open(algorithm, key: nil)
        self.algorithm = algorithm
    }

    /// Starts an HMAC with a key of any length.
    ///
    /// - Throws: `CryptoError` when the library does not have the algorithm.
    public init(_ algorithm: HashAlgorithm, key: UnsafeRawBufferPointer) throws {
        handle = try Self.open(algorithm, key: key)
        self.algorithm = algorithm
    }

    private static func open(_ algorithm: HashAlgorithm, key: UnsafeRawBufferPointer?) throws -> gcry_md_hd_t {
        try algorithm.requireSupport()
        var handle: gcry_md_hd_t?
        let flags = key == nil ? 0 : UInt32(GCRY_MD_FLAG_HMAC.rawValue)
        try Gcrypt.check(gcry_md_open(&handle, algorithm.code, flags), "Cannot start \(algorithm.rawValue)")
        guard let key else { return handle! }
        // libgcrypt takes a null key for "no key at all", an empty one has to have an address.
        let code =
            if let base = key.baseAddress { gcry_md_setkey(handle, base, key.count) } else {
                withUnsafeBytes(of: UInt8(0)) { gcry_md_setkey(handle, $0.baseAddress, 0) }
            }
        if code != 0 { gcry_md_close(handle) }
        try Gcrypt.check(code, "Cannot use the key for HMAC-\(algorithm.rawValue)")
        return handle!
    }

    deinit { gcry_md_close(handle) }

    /// Adds bytes.
    public mutating func update(_ bytes: UnsafeRawBufferPointer) {
        _ = xd_gcry_md_write(handle, bytes.baseAddress, bytes.count)
    }

    /// Adds bytes.
    public mutating func update(_ bytes: [UInt8]) { bytes.withUnsafeBytes { update($0) } }

    /// Adds the bytes of a vector of buffers, in their order.
    public mutating func update(_ buffers: UnsafeBufferPointer<iovec>) {
        for buffer in buffers { _ = xd_gcry_md_write(handle, buffer.iov_base, buffer.iov_len) }
    }

    /// The digest of all that was added.
    public consuming func finish() -> Digest {
        let length = algorithm.digestLength
        return Digest(bytes: Array(UnsafeBufferPointer(start: gcry_md_read(handle, algorithm.code), count: length)))
    }

    /// The digest of one buffer.
    public static func digest(_ algorithm: HashAlgorithm, of bytes: UnsafeRawBufferPointer) throws -> Digest {
        try algorithm.requireSupport()
        return Digest(
            bytes: [UInt8](unsafeUninitializedCapacity: algorithm.digestLength) { digest, count in
                algorithm.hash(bytes, into: digest.baseAddress!)
                count = algorithm.digestLength
            }
        )
    }

    /// The digest of one array.
    public static func digest(_ algorithm: HashAlgorithm, of bytes: [UInt8]) throws -> Digest {
        try bytes.withUnsafeBytes { try digest(algorithm, of: $0) }
    }

    /// The digest of a vector of buffers, as if they were one.
    public static func digest(_ algorithm: HashAlgorithm, of buffers: UnsafeBufferPointer<iovec>) throws -> Digest {
        var hash = try Hash(algorithm)
        hash.update(buffers)
        return hash.finish()
    }

    /// The HMAC of one array.
    public static func hmac(_ algorithm: HashAlgorithm, key: [UInt8], of bytes: [UInt8]) throws -> Digest {
        try key.withUnsafeBytes { key in
            var hash = try Hash(algorithm, key: key)
            hash.update(bytes)
            return hash.finish()
        }
    }
}
