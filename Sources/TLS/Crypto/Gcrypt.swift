internal import CGcrypt

enum Gcrypt {
    /// Initialises libgcrypt, once for the process.
    static let ready: Void = xd_gcry_initialize()

    static func check(_ code: gcry_error_t, _ what: @autoclosure () -> String) throws {
        if code != 0 { throw CryptoError("\(what()): \(String(cString: gcry_strerror(code)))") }
    }
}
