internal import CLinux
internal import Glibc
internal import IO

/// An exclusive lock on a file that ends with the process. The file holds the process id of who has it.
public final class FileLock: Sendable {
    private let fd: Int32
    /// What is removed with the lock; nil when the file stays.
    private let removed: String?

    /// Takes the lock; nil when somebody else has it.
    ///
    /// - Parameters:
    ///   - path: the file; made when it is not there.
    ///   - isRemoved: whether the file goes with the lock. One whose process was killed stays, and does no harm.
    /// - Throws: `FileError` when the file cannot be opened.
    public init?(_ path: String, isRemoved: Bool = false) throws {
        var fd: Int32 = -1
        while true {
            fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
            guard fd >= 0 else { throw FileError.system("open the lock \(path)", errno) }
            guard xd_flock_exclusive(fd) == 0 else {
                close(fd)
                return nil
            }
            // Whoever had it may have removed it since it was opened: then others take another file.
            var (ours, there) = (stat(), stat())
            if fstat(fd, &ours) == 0, stat(path, &there) == 0, ours.st_dev == there.st_dev, ours.st_ino == there.st_ino
            {
                break
            }
            close(fd)
        }
        self.fd = fd
        removed = isRemoved ? path : nil
        let pid = Array("\(getpid())\n".utf8)
        // Only for the sentence that names the holder: a full disk is no reason to refuse the lock.
        if ftruncate(fd, 0) == 0 { _ = pwrite(fd, pid, pid.count, 0) }
    }

    /// The process that has the lock, or had it last, as its file says; nil when it says nothing.
    public static func holder(of path: String) -> Int32? {
        guard let text = try? DurableFile.read(path, limit: 32) else { return nil }
        return Int32(String(decoding: text, as: UTF8.self).filter { $0.isASCII && $0.isNumber })
    }

    deinit {
        if let removed { unlink(removed) }
        close(fd)
    }
}
