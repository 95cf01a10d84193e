internal import Glibc
internal import IO
internal import Migration

/// The digests of files of this host that one offer names.
///
/// A file is read once, whatever paths lead to it. Of each identity only some are read at once, in pieces, so that what one reads
/// does not keep others waiting, and a source that is gone ends the reading.
final class FileDigests: @unchecked Sendable {
    // Unchecked: confined to the agent's control loop.

    /// A file and the state that it is in.
    private struct Identity: Hashable {
        var numbers: [UInt64]

        init(_ status: stat) {
            numbers = [
                UInt64(status.st_dev), UInt64(status.st_ino), UInt64(bitPattern: Int64(status.st_size)),
                UInt64(bitPattern: Int64(status.st_mtim.tv_sec)), UInt64(bitPattern: Int64(status.st_mtim.tv_nsec)),
                UInt64(bitPattern: Int64(status.st_ctim.tv_sec)), UInt64(bitPattern: Int64(status.st_ctim.tv_nsec)),
            ]
        }
    }
    /// Chunks of 64 KiB that are read before others have their turn on the thread: 64 MiB.
    private static let piece = 1024

    private let semaphore: KeyedSemaphore
    private let key: String
    private let abandonment: Abandonment
    private var known: [Identity: String] = [:]
    private var turn: KeyedSemaphore.Permit?
    /// How many files were read.
    private(set) var reckoned = 0

    init(_ semaphore: KeyedSemaphore, key: String, _ abandonment: Abandonment) {
        self.semaphore = semaphore
        self.key = key
        self.abandonment = abandonment
    }

    /// Whether a path leads to a regular file that is what an offer says.
    ///
    /// - Throws: `ChannelError` with `Code.closed` when the source is gone.
    func matches(_ path: String, _ file: Message.Offer.File) async throws -> Bool {
        var status = stat()
        guard stat(path, &status) == 0, status.st_mode & S_IFMT == S_IFREG, UInt64(status.st_size) == file.size else {
            return false
        }
        let identity = Identity(status)
        if let digest = known[identity] { return digest == file.digest }
        let turn = semaphore.request(key)
        self.turn = turn
        defer { turn.end() }
        try await turn.wait()
        let digest: String
        do {
            digest = try await self.digest(of: path, size: file.size)
        } catch let error as ChannelError where error.code == .closed {
            throw error
        } catch { return false }
        known[identity] = digest
        return digest == file.digest
    }

    private func digest(of path: String, size: UInt64) async throws -> String {
        reckoned += 1
        let (digests, pass) = (try ChunkDigests(size: size, isBlank: false), ChunkDigests.Pass())
        let abandonment = abandonment
        while !pass.isOver(digests) {
            _ = try await BlockingPool.background.run {
                try digests.update(from: path, in: pass, limit: Self.piece) { abandonment.hasHappened }
            }
            if abandonment.hasHappened { throw ChannelError(.closed, "The connection to the source was lost") }
        }
        return await BlockingPool.background.value { digests.digest() }
    }

    /// Does not wait any longer for a turn.
    func leave() { turn?.leave() }
}
