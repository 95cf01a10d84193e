/// Why a host does not become a member of a fleet: what happened, to what, and what to do.
public struct FleetError: Error, Sendable, Hashable, CustomStringConvertible {
    /// The sentence, without a full stop.
    public let message: String

    /// Makes an error.
    public init(_ message: String) { self.message = message }

    /// The sentence.
    public var description: String { message }
}
