internal import CLinux
internal import Glibc

/// Whether somebody listens on a Unix socket.
enum StaleSocket {
    /// Whether somebody takes connections there.
    static func isAlive(_ path: String) -> Bool {
        let fd = xd_socket(AF_UNIX, Int32(SOCK_STREAM.rawValue))
        guard fd >= 0 else { return false }
        defer { close(fd) }
        return xd_unix_connect(fd, path) == 0
    }

    /// Whether the kernel says that nobody listens there: other failures say nothing.
    static func isDead(_ path: String) -> Bool {
        let fd = xd_socket(AF_UNIX, Int32(SOCK_STREAM.rawValue))
        guard fd >= 0 else { return false }
        defer { close(fd) }
        return xd_unix_connect(fd, path) != 0 && errno == ECONNREFUSED
    }
}
