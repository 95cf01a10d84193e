internal import CLinux
internal import Glibc
internal import IO

/// An exclusive lock on a file that ends with the process. The file holds the process id of who has it.
public final class FileLock: Sendable {
    private let fd: Int32

    /// Takes the lock; nil when somebody else has it.
    ///
    /// - Throws: `FileError` when the file cannot be opened.
    public init?(_ path: String) throws {
        let fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
        guard fd >= 0 else { throw FileError.system("open the lock \(path)", errno) }
        guard xd_flock_exclusive(fd) == 0 else {
            close(fd)
            return nil
        }
        self.fd = fd
        let pid = Array("\(getpid())\n".utf8)
        // Only for the sentence that names the holder: a full disk is no reason to refuse the lock.
        if ftruncate(fd, 0) == 0 { _ = pwrite(fd, pid, pid.count, 0) }
    }

    /// The process that has the lock, or had it last, as its file says; nil when it says nothing.
    public static func holder(of path: String) -> Int32? {
        guard let text = try? DurableFile.read(path, limit: 32) else { return nil }
        return Int32(String(decoding: text, as: UTF8.self).filter { $0.isASCII && $0.isNumber })
    }

    deinit { close(fd) }
}
