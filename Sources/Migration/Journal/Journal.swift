internal import CLinux
internal import Glibc
internal import IO
internal import TLS

/// An append-only file of checksummed records; a record counts once it is on stable storage.
public final class Journal: Sendable {
    /// The version of the format that is written and read.
    public static let version = 1
    /// How many bytes a journal has at most; they are reserved before it is used.
    public static let capacity = 65536

    /// The file.
    public let path: String
    private let state: Guarded<State>

    private struct State {
        var fd: Int32
        /// Everything that was written, durable or not.
        var text: [UInt8]
        /// Whether an `fsync` has failed: the kernel may then hold for clean what never reached the disk.
        var isDoubtful = false
    }

    private struct Header: Codable {
        struct Journal: Codable { var version: Int }
        var journal: Journal
    }

    /// Creates a journal with space reserved for all the records that a migration writes.
    ///
    /// - Throws: `FileError` when the file exists or cannot be made durable: the migration must not start.
    public init(creating path: String) throws {
        self.path = path
        let header = try Self.line(JSONText.encode(Header(journal: .init(version: Self.version))))
        let fd = try Self.create(path, header)
        state = Guarded(State(fd: fd, text: header))
        try DurableFile.syncDirectory(of: path)
    }

    /// Opens a journal to append to it; a record that a crash has torn is cut off.
    ///
    /// The file is made anew: what was read may be in memory only, when the one who wrote it could not make it durable.
    ///
    /// - Throws: `JournalError` when the journal cannot be understood, `FileError` when it cannot be made durable.
    public init(opening path: String) throws {
        self.path = path
        guard let text = try DurableFile.read(path, limit: 2 * Self.capacity) else {
            throw FileError.system("open the journal \(path)", ENOENT)
        }
        let valid = Array(text.prefix(try Self.parse(text, path).length))
        state = Guarded(State(fd: try Self.replace(path, valid), text: valid))
    }

    private static func create(_ path: String, _ text: [UInt8]) throws -> Int32 {
        let fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0o600)
        guard fd >= 0 else { throw FileError.system("create the journal \(path)", errno) }
        do {
            // The reservation lies beyond the end of the file; a file system that cannot reserve is taken as it is.
            guard xd_reserve(fd, off_t(capacity)) == 0 || errno == EOPNOTSUPP else {
                throw FileError.system("reserve space for the journal \(path)", errno)
            }
            try DurableFile.append(text, to: fd, path: path)
            guard fsync(fd) == 0 else {
                throw FileError.system("write the journal \(path) to stable storage", errno)
            }
            return fd
        } catch {
            close(fd)
            unlink(path)
            throw error
        }
    }

    /// Puts a new file in the place of a journal.
    private static func replace(_ path: String, _ text: [UInt8]) throws -> Int32 {
        let temporary = "\(path).new"
        unlink(temporary)
        let fd = try create(temporary, text)
        guard rename(temporary, path) == 0 else {
            let number = errno
            close(fd)
            throw FileError.system("replace the journal \(path)", number)
        }
        do { try DurableFile.syncDirectory(of: path) } catch {
            close(fd)
            throw error
        }
        return fd
    }

    deinit { state.withLock { _ = close($0.fd) } }

    private static func line(_ body: [UInt8]) -> [UInt8] {
        Array(HashAlgorithm.sha256.hash(body).hex.prefix(16).utf8) + [UInt8(ascii: " ")] + body + [UInt8(ascii: "\n")]
    }

    /// Appends a record and waits until it is on stable storage.
    ///
    /// Once an `fsync` has failed the file is not trusted any more: what follows goes into a new one, which takes its place.
    ///
    /// - Throws: `JournalError`, `notWritten` or `doubtful`.
    public func append(_ record: JournalRecord) throws {
        let line: [UInt8]
        do { line = try Self.line(JSONText.encode(record.bounded)) } catch {
            throw JournalError(kind: .notWritten, description: "\(error)")
        }
        try state.withLock { state in
            guard state.text.count + line.count <= Self.capacity else {
                throw JournalError(kind: .notWritten, description: "The journal \(path) is full")
            }
            if state.isDoubtful {
                let fd: Int32
                do { fd = try Self.replace(path, state.text + line) } catch {
                    throw JournalError(kind: .doubtful, description: "\(error)")
                }
                close(state.fd)
                state = State(fd: fd, text: state.text + line)
                return
            }
            do {
                try DurableFile.append(line, to: state.fd, path: path)
            } catch {
                // Half a record would hide all that follow it.
                if ftruncate(state.fd, off_t(state.text.count)) != 0 { state.isDoubtful = true }
                throw JournalError(kind: .notWritten, description: "\(error)")
            }
            state.text += line
            guard fsync(state.fd) == 0 else {
                let number = errno
                state.isDoubtful = true
                throw JournalError(
                    kind: .doubtful,
                    description: "\(FileError.system("write the journal \(path) to stable storage", number))"
                )
            }
        }
    }

    /// Appends a record, as `append` does, beside the caller's loop: an `fsync` takes as long as the disk likes. Whoever calls it
    /// lets one call end before the next: two at once have no order.
    ///
    /// - Throws: `JournalError`, `notWritten` or `doubtful`.
    public func write(_ record: JournalRecord) async throws {
        try await BlockingPool.shared.run { try self.append(record) }
    }

    /// The records of a journal; a last one that a crash has torn does not count. Empty when there is no journal.
    ///
    /// - Throws: `JournalError` when the journal is damaged in its middle or of a later version.
    public static func read(_ path: String) throws -> [JournalRecord] {
        try parse(try DurableFile.read(path, limit: 2 * capacity) ?? [], path).records
    }

    private static func parse(_ bytes: [UInt8], _ path: String) throws -> (records: [JournalRecord], length: Int) {
        var records: [JournalRecord] = []
        var length = 0
        var isFirst = true
        var isTorn = false
        func unreadable(_ what: String) -> JournalError {
            JournalError(
                kind: .unreadable,
                description: "The journal \(path) \(what); nothing is done about its guest until that is settled",
                records: records
            )
        }
        for line in bytes.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false).dropLast() {
            let parts = line.split(separator: UInt8(ascii: " "), maxSplits: 1)
            let isWhole =
                parts.count == 2
                && Array(HashAlgorithm.sha256.hash(parts[1]).hex.prefix(16).utf8) == Array(parts[0])
            // A crash tears the last record only.
            if isWhole, isTorn { throw unreadable("is damaged at byte \(length)") }
            guard isWhole else {
                isTorn = true
                continue
            }
            let body = Array(parts[1])
            if isFirst {
                guard let header = JSONText.decode(Header.self, from: body) else { throw unreadable("is no journal") }
                guard header.journal.version == version else {
                    throw unreadable("was written by a later version of Crossdock (format \(header.journal.version))")
                }
                isFirst = false
            } else {
                guard let record = JSONText.decode(JournalRecord.self, from: body) else {
                    throw unreadable("has a record that this version of Crossdock does not know")
                }
                records.append(record)
            }
            length += line.count + 1
        }
        return (records, length)
    }
}
