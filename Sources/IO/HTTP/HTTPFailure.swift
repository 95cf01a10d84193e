/// Why an HTTP message is not taken, and what to tell the peer.
public struct HTTPFailure: Error, Sendable, Hashable, CustomStringConvertible {
    /// The HTTP status for the peer; 0 for what a client finds wrong with an answer.
    public let status: Int
    /// The second half of a sentence, without a full stop: "the head does not end".
    public let reason: String

    /// Makes a failure.
    public init(status: Int, reason: String) {
        self.status = status
        self.reason = reason
    }

    /// The reason.
    public var description: String { reason }
}
