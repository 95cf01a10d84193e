internal import Glibc
internal import IO

/// The book of grants of a host, in a file of its state directory with mode 0600 that its destination agent alone writes. From any thread.
public final class ConsoleGrants: Sendable {
    private struct Ledger {
        var book: ConsoleGrantBook
        /// How often it has changed.
        var version = 0
        /// When the file was written last.
        var written: Int
    }

    /// How old what the file says of a grant's time may be, in seconds.
    private static let delay = 3600

    private let path: String
    private let ledger: Guarded<Ledger>
    /// Which version is in the file. Who only asks does not wait for who writes.
    private let file = Guarded(0)

    private static var now: Int { Glibc.time(nil) }

    /// Reads what an earlier agent has left; a file that cannot be read or understood is an empty book. Blocks.
    public init(stateDirectory: String) {
        path = "\(stateDirectory)/console-grants.json"
        let bytes = (try? DurableFile.read(path, limit: 16 << 20)) ?? nil
        let book = bytes.flatMap { JSONText.decode(ConsoleGrantBook.self, from: $0) } ?? ConsoleGrantBook()
        ledger = Guarded(Ledger(book: book, written: Self.now))
    }

    /// Notes a grant durably. Blocks.
    ///
    /// - Throws: `FileError`; the grant holds until the agent ends all the same.
    public func add(_ granting: ConsoleGranting, guest: String, identity: String) throws {
        try change { $0.add(granting, guest: guest, identity: identity, now: Self.now) }
    }

    /// See `ConsoleGrantBook.admit`. Blocks.
    public func admit(_ grant: ConsoleGrant, guest: String, identity: String) -> ConsoleGrantBook.Right? {
        let right = ledger.withLock { $0.book.admit(grant, guest: guest, identity: identity, now: Self.now) }
        // A time that is not written is one that ends earlier after a restart.
        if right != nil { try? change { _ in } }
        return right
    }

    /// Whether a right that is being used still holds. Writes the file now and then.
    public func renew(_ right: ConsoleGrantBook.Right) -> Bool {
        let (holds, isDue) = ledger.withLock { ledger in
            (ledger.book.renew(right, now: Self.now), Self.now - ledger.written >= Self.delay)
        }
        if holds, isDue { Task { await BlockingPool.shared.value { try? self.change { _ in } } } }
        return holds
    }

    /// See `ConsoleGrantBook.remove`. Blocks.
    ///
    /// - Throws: `FileError`.
    public func remove(guest: String, identity: String) throws {
        try change { $0.remove(guest: guest, identity: identity) }
    }

    private func change(_ body: (inout ConsoleGrantBook) -> Void) throws {
        let (book, version, isNeeded) = ledger.withLock { ledger in
            let before = ledger.book.count
            body(&ledger.book)
            ledger.version += 1
            ledger.written = Self.now
            return (ledger.book, ledger.version, before + ledger.book.count > 0)
        }
        guard isNeeded else { return }
        let path = path
        try file.withLock { latest in
            guard version > latest else { return }
            try DurableFile.write(try JSONText.encode(book), to: path)
            latest = version
        }
    }
}
