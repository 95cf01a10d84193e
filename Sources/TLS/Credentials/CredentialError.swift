/// What went wrong with credentials or certificates, naming the file and the remedy.
public struct CredentialError: Error, Sendable, CustomStringConvertible {
    /// The sentence.
    public let message: String

    /// Makes an error.
    @inline(never)
    public init(_ message: String) { self.message = message }

    /// The sentence.
    public var description: String { message }
}
