internal import CLinux
internal import Glibc
internal import IO

/// That one pairing is under way on this host, as long as it lives.
public final class PairingLock: Sendable {
    private let descriptor: Int32

    /// Takes it; nil when somebody has it.
    init?(_ path: String) throws {
        descriptor = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
        guard descriptor >= 0 else { throw FileError("\(path) cannot be opened: \(String(cString: strerror(errno)))") }
        guard xd_flock_exclusive(descriptor) == 0 else {
            close(descriptor)
            return nil
        }
    }

    deinit { close(descriptor) }
}
