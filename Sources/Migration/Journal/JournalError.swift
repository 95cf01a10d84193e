/// A journal that cannot be read or written.
public struct JournalError: Error, Sendable, CustomStringConvertible {
    /// The kind of failure.
    public enum Kind: Sendable, Hashable {
        /// The record is not in the journal.
        case notWritten
        /// The record may or may not be found by whoever reads the journal later: nothing may be done on it, and nothing
        /// may be done that it forbids.
        case doubtful
        /// The journal is damaged in its middle, or a later version wrote it: what it says cannot be known.
        case unreadable
    }

    /// The kind.
    public let kind: Kind
    /// What happened, to which file.
    public let description: String
    /// The records before the damage.
    public var records: [JournalRecord] = []
}
