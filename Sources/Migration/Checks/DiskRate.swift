internal import CLinux
internal import Glibc
internal import IO

/// How fast a file system takes what is written to it past the page cache.
enum DiskRate {
    private static let piece = 1 << 20
    private static let most = 256

    /// Writes a scratch file for a second at most, 256 MiB at most, and removes it. Blocks.
    ///
    /// - Parameter directory: where.
    /// - Returns: bytes per second, of stable storage.
    /// - Throws: `FileError` when it cannot be written.
    static func measure(in directory: String) throws -> Double {
        let path = "\(directory)/.crossdock-rate-\(getpid())"
        let fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | xd_o_direct(), 0o600)
        // A file system that cannot do without the page cache is measured with it.
        let descriptor = fd >= 0 ? fd : open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0o600)
        guard descriptor >= 0 else { throw FileError.system("create \(path)", errno) }
        defer {
            close(descriptor)
            unlink(path)
        }
        var memory: UnsafeMutableRawPointer?
        guard posix_memalign(&memory, 4096, piece) == 0, let memory else {
            throw FileError("There is no memory to measure \(directory)")
        }
        defer { free(memory) }
        memset(memory, 0x5a, piece)
        let began = ContinuousClock.now
        var written = 0
        while written < most * piece, ContinuousClock.now - began < .seconds(1) {
            let count = write(descriptor, memory, piece)
            if count < 0, errno == EINTR { continue }
            guard count > 0 else { throw FileError.system("write \(path)", errno) }
            written += count
        }
        guard fdatasync(descriptor) == 0 else { throw FileError.system("write \(path) to stable storage", errno) }
        return Double(written) / max((ContinuousClock.now - began) / .seconds(1), 0.000_001)
    }
}
