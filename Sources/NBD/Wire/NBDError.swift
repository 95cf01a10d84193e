/// An error of the protocol with its number on the wire.
public struct NBDError: Error, Sendable, CustomStringConvertible {
    /// The numbers that the protocol knows; others are to be read as `invalid`.
    public enum Number: UInt32, Sendable {
        /// EPERM: the export is read-only.
        case notPermitted = 1
        /// EIO.
        case io = 5
        /// ENOMEM.
        case noMemory = 12
        /// EINVAL.
        case invalid = 22
        /// ENOSPC.
        case noSpace = 28
        /// EOVERFLOW.
        case overflow = 75
        /// ENOTSUP.
        case notSupported = 95
        /// ESHUTDOWN.
        case shutdown = 108
    }

    /// The number.
    public let number: Number
    /// What happened, as a sentence.
    public let message: String

    /// Makes an error.
    @inline(never)
    public init(_ number: Number, _ message: String) {
        self.number = number
        self.message = message
    }

    /// The sentence.
    public var description: String { message }
}
