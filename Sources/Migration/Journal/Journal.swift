internal import CLinux
internal import Emulator
internal import Glibc
internal import IO
internal import TLS

/// What a side of a migration has decided, durably. Who may run the guest follows from these records alone.
public enum JournalRecord: Sendable, Hashable, Codable {
    /// Source: a migration of this guest began.
    ///
    /// `order` counts the migrations of this host, so that their order does not depend on any clock.
    case offered(guest: String, destination: String, order: Int)
    /// Destination: an offer of this guest was accepted.
    case accepted(guest: String, source: String, order: Int)
    /// Destination: everything is there, the source may release the guest.
    case prepared
    /// Source: the guest belongs to the destination; this side must not run it any more.
    case released
    /// Destination: the guest belongs to this side. The digests are those of its disks at the switchover.
    case owner(digests: [String: String])
    /// Source: the destination confirmed that it owns the guest.
    case confirmed
    /// Either side: the migration was given up before the release.
    case rolledBack(reason: String)
}

extension Sequence<JournalRecord> {
    /// Whether the migration was given up.
    public var isRolledBack: Bool { contains { if case .rolledBack = $0 { true } else { false } } }

    /// The digests with which the destination took the guest over; nil when it has not.
    public var ownerDigests: [String: String]? {
        for case .owner(let digests) in self { return digests }
        return nil
    }
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
        // The reservation lies beyond the end of the file; a file system that cannot reserve is taken as it is.
        guard xd_reserve(fd, 65536) == 0 || errno == EOPNOTSUPP else {
            throw ChannelError.system("reserve space for the journal \(path)", errno)
        }
        try DurableFile.syncDirectory(of: path)
    }

    /// Opens a journal to append to it; a record that a crash has torn is cut off.
    public init(opening path: String) throws {
        self.path = path
        fd = open(path, O_RDWR | O_APPEND | O_CLOEXEC)
        guard fd >= 0 else { throw ChannelError.system("open the journal \(path)", errno) }
        let valid = try Self.parse(DurableFile.read(path) ?? []).length
        guard ftruncate(fd, off_t(valid)) == 0 else { throw ChannelError.system("repair the journal \(path)", errno) }
    }

    deinit { close(fd) }

    /// Appends a record and waits until it is on stable storage.
    ///
    /// - Throws: `ChannelError`; the record may or may not be durable then, and nothing may be done on it.
    public func append(_ record: JournalRecord) throws {
        let body = try JSONText.encode(record)
        let line =
            Array(HashAlgorithm.sha256.hash(body).hex.prefix(16).utf8) + [UInt8(ascii: " ")] + body + [
                UInt8(ascii: "\n")
            ]
        let end = lseek(fd, 0, SEEK_END)
        do {
            try DurableFile.append(line, to: fd, path: path)
        } catch {
            // Half a record would hide all that follow it.
            _ = ftruncate(fd, end)
            throw error
        }
        guard fsync(fd) == 0 else {
            let number = errno
            // Whoever reads the journal later must not find what was never decided.
            _ = ftruncate(fd, end)
            throw ChannelError.system("write the journal \(path) to stable storage", number)
        }
    }

    /// The records of a journal up to the first damaged one: a torn write ends the journal.
    public static func read(_ path: String) throws -> [JournalRecord] {
        parse(try DurableFile.read(path) ?? []).records
    }

    private static func parse(_ bytes: [UInt8]) -> (records: [JournalRecord], length: Int) {
        var records: [JournalRecord] = []
        var length = 0
        for line in bytes.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false) {
            let parts = line.split(separator: UInt8(ascii: " "), maxSplits: 1)
            guard parts.count == 2,
                Array(HashAlgorithm.sha256.hash(parts[1]).hex.prefix(16).utf8) == Array(parts[0]),
                let record = JSONText.decode(JournalRecord.self, from: Array(parts[1]))
            else { break }
            // Without its end the record was torn, however right it looks.
            guard length + line.count < bytes.count else { break }
            records.append(record)
            length += line.count + 1
        }
        return (records, length)
    }
}
