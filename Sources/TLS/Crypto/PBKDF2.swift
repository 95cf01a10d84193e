internal import CGcrypt
internal import Glibc

/// Keys from passphrases (RFC 8018, section 5.2).
public enum PBKDF2 {
    /// Whether the library can use this hash function.
    public static func isSupported(with algorithm: HashAlgorithm) -> Bool { algorithm.isSupported }

    /// Derives a key.
    ///
    /// - Parameters:
    ///   - algorithm: the hash function of the HMAC.
    ///   - passphrase: the passphrase; not empty.
    ///   - salt: the salt; not empty.
    ///   - iterations: how often the function is applied, at least once.
    ///   - length: how many bytes, at least one.
    /// - Throws: `CryptoError` that names the parameter which is out of bounds.
    public static func derive(
        _ algorithm: HashAlgorithm,
        passphrase: [UInt8],
        salt: [UInt8],
        iterations: Int,
        length: Int
    ) throws -> [UInt8] {
        try algorithm.requireSupport()
        guard !passphrase.isEmpty else { throw CryptoError("PBKDF2 needs a passphrase that is not empty") }
        guard !salt.isEmpty else { throw CryptoError("PBKDF2 needs a salt") }
        guard (1...Int(UInt32.max)).contains(iterations) else {
            throw CryptoError("PBKDF2 iterations \(iterations) must be between 1 and \(UInt32.max)")
        }
        guard (1...(1 << 20)).contains(length) else {
            throw CryptoError("PBKDF2 key length \(length) must be between 1 and \(1 << 20) bytes")
        }
        var key = [UInt8](repeating: 0, count: length)
        try Gcrypt.check(
            gcry_kdf_derive(
                passphrase,
                passphrase.count,
                Int32(GCRY_KDF_PBKDF2.rawValue),
                algorithm.code,
                salt,
                salt.count,
                UInt(iterations),
                length,
                &key
            ),
            "Cannot derive a key"
        )
        return key
    }

    /// How many iterations take `time` of this thread's processor on this machine, at least 1000.
    ///
    /// Doubles the number until the measurement is long enough to trust, then scales; other load on the machine does not
    /// count.
    public static func countIterations(
        _ algorithm: HashAlgorithm,
        length: Int,
        taking time: Duration
    ) throws -> Int {
        var iterations = 1 << 10
        while true {
            let start = processorTime()
            _ = try derive(
                algorithm,
                passphrase: Array("measure".utf8),
                salt: [1, 2, 3, 4],
                iterations: iterations,
                length: length
            )
            let used = processorTime() - start
            if used >= .milliseconds(50) || iterations >= 1 << 30 {
                return max(1000, Int((Double(iterations) * (time / used)).rounded()))
            }
            iterations *= 2
        }
    }

    private static func processorTime() -> Duration {
        var now = timespec()
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now)
        return .seconds(now.tv_sec) + .nanoseconds(now.tv_nsec)
    }
}
