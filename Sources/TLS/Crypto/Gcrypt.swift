internal import CGcrypt

/// What went wrong in a cryptographic operation: which algorithm, and what about it.
public struct CryptoError: Error, Sendable, CustomStringConvertible {
    /// The sentence. Never holds key material or plaintext.
    public let description: String

    /// Makes an error.
    @inline(never)
    public init(_ message: String) { description = message }
}

enum Gcrypt {
    /// Initialises libgcrypt, once for the process.
    static let ready: Void = xd_gcry_initialize()

    static func check(_ code: gcry_error_t, _ what: @autoclosure () -> String) throws {
        if code != 0 { throw CryptoError("\(what()): \(String(cString: gcry_strerror(code)))") }
    }
}
