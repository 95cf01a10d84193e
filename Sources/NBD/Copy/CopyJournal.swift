internal import FoundationEssentials
internal import IO

/// How far a copy has got, in a file that survives its end, so that a later run goes on there.
///
/// The position is recorded only after everything before it was made durable at the target.
public struct CopyJournal: Codable, Sendable {
    /// What was copied.
    public var source: String
    /// Where to.
    public var target: String
    /// The size of the source in bytes.
    public var size: UInt64
    /// What a change of the source would change, as far as that can be seen: a file's inode and time of modification.
    public var stamp: String
    /// The same for the target: a file that was made anew has another inode.
    public var targetStamp: String
    /// Up to here everything is at the target.
    public var position: UInt64
    private var version = 1

    /// Begins a record.
    public init(source: String, target: String, size: UInt64, stamp: String, targetStamp: String) {
        self.source = source
        self.target = target
        self.size = size
        self.stamp = stamp
        self.targetStamp = targetStamp
        position = 0
    }

    /// Reads a record; nil when there is none.
    ///
    /// - Throws: `FileError` for a file that is no such record.
    public static func load(_ path: String) throws -> CopyJournal? {
        guard let bytes = try DurableFile.read(path) else { return nil }
        guard let journal = try? JSONDecoder().decode(CopyJournal.self, from: Data(bytes)), journal.version == 1,
            journal.position <= journal.size
        else {
            throw FileError("\(path) is no record of a copy; remove it, or give another file")
        }
        return journal
    }

    /// Whether the record is about the same copy.
    ///
    /// - Throws: `FileError` that says what is different.
    public func check(against other: CopyJournal, path: String) throws {
        let differs: String? =
            if source != other.source {
                "source"
            } else if target != other.target {
                "target"
            } else if size != other.size {
                "size of the source"
            } else if stamp != other.stamp {
                "state of the source"
            } else if targetStamp != other.targetStamp {
                "file at the target"
            } else {
                nil
            }
        if let differs {
            throw FileError(
                "\(path) records another copy: the \(differs) is not the same; remove it to begin anew"
            )
        }
    }

    /// Writes the record durably.
    public func save(to path: String) throws { try DurableFile.write(Array(JSONEncoder().encode(self)), to: path) }
}
