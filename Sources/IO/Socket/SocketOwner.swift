internal import Glibc

/// Who may connect to a Unix socket that this process listens on.
public enum SocketOwner {
    /// Gives a socket to the user of a process, and lets that user pass through the socket's directories, if it is another one
    /// than this process's. Only root can do that; for anybody else nothing happens.
    ///
    /// - Parameters:
    ///   - path: the socket.
    ///   - process: the only process that is meant to connect; nothing happens for nil.
    ///   - depth: how many directories above the socket are this program's own.
    /// - Throws: `FileError` that names the socket.
    public static func give(_ path: String, to process: Int32?, depth: Int = 3) throws {
        var status = stat()
        guard geteuid() == 0, let process, stat("/proc/\(process)", &status) == 0, status.st_uid != 0 else { return }
        guard lchown(path, status.st_uid, gid_t.max) == 0 else {
            throw FileError.system("give \(path) to the user \(status.st_uid), which QEMU runs as", errno)
        }
        var directory = path
        for _ in 0..<depth {
            guard let slash = directory.lastIndex(of: "/"), slash != directory.startIndex else { return }
            directory = String(directory[..<slash])
            guard stat(directory, &status) == 0, status.st_uid == 0, status.st_mode & 0o001 == 0 else { continue }
            chmod(directory, (status.st_mode & 0o7777) | 0o001)
        }
    }
}
