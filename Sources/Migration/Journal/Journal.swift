internal import FoundationEssentials
internal import Glibc
internal import IO
internal import TLS

/// What a side of a migration has decided, durably. Who may run the guest follows from these records alone.
public enum JournalRecord: Sendable, Hashable, Codable {
    /// Source: a migration of this guest began.
    case offered(guest: String, destination: String)
    /// Destination: an offer of this guest was accepted.
    case accepted(guest: String, source: String)
    /// Destination: everything is there, the source may release the guest.
    case prepared
    /// Source: the guest belongs to the destination; this side must not run it any more.
    case released
    /// Destination: the guest belongs to this side.
    case owner
    /// Source: the destination confirmed that it owns the guest.
    case confirmed
    /// Either side: the migration was given up before the release.
    case rolledBack(reason: String)
}

/// An append-only file of checksummed records; a record counts once it is on stable storage.
public final class Journal: Sendable {
    /// The file.
    public let path: String
    private let fd: Int32

    /// Creates a journal with space reserved for all the records that a migration writes.
    ///
    /// - Throws: `ChannelError` when the file exists or cannot be made durable: the migration must not start.
    public init(creating path: String) throws {
        self.path = path
        fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0o600)
        guard fd >= 0 else { throw ChannelError.system("create the journal \(path)", errno) }
        // The reservation lies beyond the end of the file, so that reading stops at the last record.
        let code = posix_fallocate(fd, 0, 65536)
        guard code == 0, ftruncate(fd, 0) == 0 else {
            throw ChannelError.system("reserve space for the journal \(path)", code == 0 ? errno : code)
        }
        try DurableFile.syncDirectory(of: path)
    }

    /// Opens a journal to append to it.
    public init(opening path: String) throws {
        self.path = path
        fd = open(path, O_RDWR | O_APPEND | O_CLOEXEC)
        guard fd >= 0 else { throw ChannelError.system("open the journal \(path)", errno) }
    }

    deinit { close(fd) }

    /// Appends a record and waits until it is on stable storage.
    ///
    /// - Throws: `ChannelError`; the record may or may not be durable then, and nothing may be done on it.
    public func append(_ record: JournalRecord) throws {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        let body = Array(try encoder.encode(record))
        let line = Array(SHA256.hash(body).hex.prefix(16).utf8) + [UInt8(ascii: " ")] + body + [UInt8(ascii: "\n")]
        try DurableFile.append(line, to: fd, path: path)
        guard fsync(fd) == 0 else { throw ChannelError.system("write the journal \(path) to stable storage", errno) }
    }

    /// The records of a journal up to the first damaged one: a torn write ends the journal.
    public static func read(_ path: String) throws -> [JournalRecord] {
        guard let bytes = try DurableFile.read(path) else { return [] }
        var records: [JournalRecord] = []
        for line in bytes.split(separator: UInt8(ascii: "\n")) {
            let parts = line.split(separator: UInt8(ascii: " "), maxSplits: 1)
            guard parts.count == 2, Array(SHA256.hash(parts[1]).hex.prefix(16).utf8) == Array(parts[0]),
                let record = try? JSONDecoder().decode(JournalRecord.self, from: Data(parts[1]))
            else { break }
            records.append(record)
        }
        return records
    }
}
