/// Why hosts were not paired, and what became of what was done.
public struct PairingFailure: Error, Sendable, Hashable, CustomStringConvertible {
    /// What became of it.
    public enum Outcome: Sendable, Hashable {
        /// Nothing was changed.
        case unchanged
        /// All that was done was undone.
        case undone
        /// This could not be undone, a sentence each.
        case left([String])
        /// The hosts were paired before, and still are: their verification or renewal has failed.
        case kept
    }

    /// Why, a sentence without a full stop.
    public let reason: String
    /// What became of it.
    public let outcome: Outcome

    /// Makes one.
    public init(reason: String, outcome: Outcome) {
        self.reason = reason
        self.outcome = outcome
    }

    /// All of it, for the operator.
    public var description: String {
        switch outcome {
        case .unchanged: "\(reason). Nothing was changed"
        case .undone: "\(reason). What had been done was undone"
        case .left(let sentences): "\(reason). Not undone: \(sentences.joined(separator: "; "))"
        case .kept: "\(reason). The hosts stay paired as they were"
        }
    }
}
