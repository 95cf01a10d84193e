internal import CLinux
internal import Glibc

/// Whether somebody listens at a Unix socket: a server binds it, which gives it its name, a moment before that.
public func isListening(_ path: String) -> Bool {
    let probe = xd_socket(AF_UNIX, Int32(SOCK_STREAM.rawValue))
    guard probe >= 0 else { return false }
    defer { close(probe) }
    return xd_unix_connect(probe, path) == 0
}
