/// What went wrong in a cryptographic operation: which algorithm, and what about it.
public struct CryptoError: Error, Sendable, CustomStringConvertible {
    /// The sentence. Never holds key material or plaintext.
    public let description: String

    /// Makes an error.
    @inline(never)
    public init(_ message: String) { description = message }
}
