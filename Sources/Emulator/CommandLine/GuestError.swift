/// A guest cannot be described or moved; the sentence names the option.
public struct GuestError: Error, Sendable, CustomStringConvertible {
    /// The sentence.
    public let message: String
    /// Makes an error.
    @inline(never)
    public init(_ message: String) { self.message = message }
    /// The sentence.
    public var description: String { message }
}
