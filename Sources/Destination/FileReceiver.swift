internal import Glibc
internal import IO
internal import Migration

/// Receives the files of a guest that this host does not have.
final class FileReceiver: @unchecked Sendable {
    // Unchecked: confined to the agent's control loop.
    let progress = AsyncCondition()
    private(set) var failure: (any Error)?
    private let files: [Message.Offer.File]
    private let store: String
    private var missing: [Int]
    private var current: (index: Int, fd: Int32, rest: UInt64)?
    /// While a pool thread writes, the descriptor stays open, whatever happens.
    private var isWriting = false
    private let migration: String

    init(_ files: [Message.Offer.File], _ missing: [Int], store: String, migration: String) {
        self.migration = migration
        self.files = files
        self.missing = missing
        self.store = store
    }

    deinit {
        if let current { close(current.fd) }
        for index in missing { unlink(path(index)) }
    }

    var isComplete: Bool { missing.isEmpty && failure == nil }

    /// Where a file is until it is complete.
    func path(_ index: Int) -> String { "\(store)/.new-\(migration)-\(index)" }

    func begin(_ index: Int) async throws {
        guard current == nil, missing.first == index else {
            throw ChannelError(.protocolViolation, "A file that was not asked for")
        }
        let fd = open(path(index), O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0o600)
        guard fd >= 0 else { return fail(FileError.system("create \(path(index))", errno)) }
        current = (index, fd, files[index].size)
        await finishIfComplete()
    }

    /// Ends the receiving for whoever waits for it.
    func abandon(_ error: any Error) { fail(error) }

    func receive(_ bytes: [UInt8]) async throws {
        if failure != nil { return }
        guard let (index, fd, rest) = current, UInt64(bytes.count) <= rest else {
            throw ChannelError(.protocolViolation, "More data than the file has")
        }
        do {
            let path = path(index)
            isWriting = true
            defer { isWriting = false }
            try await BlockingPool.shared.run { try DurableFile.append(bytes, to: fd, path: path) }
        } catch {
            return fail(error)
        }
        if failure != nil {
            close(fd)
            current = nil
            return
        }
        current = (index, fd, rest - UInt64(bytes.count))
        progress.signal()
        await finishIfComplete()
    }

    private func finishIfComplete() async {
        guard let (_, fd, rest) = current, rest == 0 else { return }
        isWriting = true
        let number = await BlockingPool.shared.value { fsync(fd) == 0 ? 0 : errno }
        isWriting = false
        close(fd)
        current = nil
        if failure != nil { return }
        if number != 0 { return fail(FileError.system("store a file of the guest", number)) }
        missing.removeFirst()
        progress.signal()
    }

    private func fail(_ error: any Error) {
        if failure == nil { failure = error }
        if let current, !isWriting {
            close(current.fd)
            self.current = nil
        }
        progress.signal()
    }
}
