internal import Glibc

/// What went wrong on a channel: a stable code, and a sentence that names the peer, the path or the address.
public struct ChannelError: Error, Sendable, CustomStringConvertible {
    /// The kind of failure, for decisions in code.
    public enum Code: Sendable {
        /// The channel was closed, or the peer closed it before a message was complete.
        case closed
        /// The peer ended the connection without the orderly end that its protocol has.
        case truncated
        /// A deadline passed.
        case timedOut
        /// The task that used the channel was cancelled.
        case cancelled
        /// A system call failed.
        case system
        /// A name could not be resolved.
        case unresolved
        /// TLS failed: the handshake, a certificate, a record.
        case tls
        /// The peer broke the rules of a protocol.
        case protocolViolation
    }

    /// The kind of failure.
    public let code: Code
    /// What happened and to what, as a sentence without a final full stop.
    public let message: String
    /// The system's error number, for `Code.system`.
    public let number: Int32?

    /// Makes an error.
    @inline(never)
    public init(_ code: Code, _ message: String, number: Int32? = nil) {
        self.code = code
        self.message = message
        self.number = number
    }

    /// The error of a failed system call.
    @inline(never)
    public static func system(_ action: String, _ number: Int32) -> ChannelError {
        ChannelError(.system, "Cannot \(action): \(String(cString: strerror(number)))", number: number)
    }

    /// The sentence.
    public var description: String { message }
}
