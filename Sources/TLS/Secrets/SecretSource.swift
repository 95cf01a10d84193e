internal import CLinux
internal import Glibc

/// Where the bytes of a secret come from.
enum SecretSource {
    /// How many bytes a secret has at most.
    static let limit = 1 << 20
    /// How long a pipe may take until its writer is done.
    private static let patience: Int32 = 10_000

    /// Reads a file, a pipe or anything else with a path; `/dev/fd/N` names an inherited descriptor.
    static func file(_ path: String) throws -> SecretBytes {
        // Without O_NONBLOCK, opening a FIFO that nobody writes would wait for ever.
        let fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
        guard fd >= 0 else { throw CredentialError("Unable to read \(path): \(String(cString: strerror(errno)))") }
        defer { close(fd) }
        return try read(fd, path)
    }

    /// Reads an inherited descriptor to its end and closes it, so that no child inherits it again.
    static func descriptor(_ fd: Int32) throws -> SecretBytes {
        guard fcntl(fd, F_GETFD) >= 0 else {
            throw CredentialError("Unable to read file descriptor \(fd): it is not open")
        }
        defer { close(fd) }
        return try read(fd, "file descriptor \(fd)")
    }

    private static func read(_ fd: Int32, _ name: String) throws -> SecretBytes {
        var status = stat()
        guard fstat(fd, &status) == 0, status.st_mode & S_IFMT != S_IFDIR else {
            throw CredentialError("Unable to read \(name): it is a directory")
        }
        let end = ContinuousClock.now + .milliseconds(Int(patience))
        return try SecretBytes(capacity: limit) { buffer in
            var done = 0
            while done < buffer.count {
                var waiting = pollfd(fd: fd, events: Int16(POLLIN), revents: 0)
                let left = (end - .now) / .milliseconds(1)
                let ready = poll(&waiting, 1, Int32(max(left, 0)))
                if ready < 0, errno == EINTR { continue }
                guard ready > 0 else {
                    throw CredentialError("Unable to read \(name): its writer is not done within \(patience / 1000) s")
                }
                let count = Glibc.read(fd, buffer.baseAddress! + done, buffer.count - done)
                if count == 0 { return done }
                if count > 0 {
                    done += count
                } else if errno != EINTR, errno != EAGAIN {
                    throw CredentialError("Unable to read \(name): \(String(cString: strerror(errno)))")
                }
            }
            throw CredentialError("Unable to read \(name): a secret has less than 1 MiB")
        }
    }

    /// Reads a key of the kernel's keyring (keyctl(2), KEYCTL_READ).
    static func keyring(_ serial: Int32) throws -> SecretBytes {
        let failure = "Unable to read keyring key \(serial)"
        let size = xd_keyring_read(serial, nil, 0)
        guard size >= 0 else { throw CredentialError("\(failure): \(String(cString: strerror(errno)))") }
        return try SecretBytes(capacity: max(Int(size), 1)) { buffer in
            let count = xd_keyring_read(serial, buffer.baseAddress, buffer.count)
            guard count >= 0 else { throw CredentialError("\(failure): \(String(cString: strerror(errno)))") }
            guard count <= buffer.count else { throw CredentialError("\(failure): it changed meanwhile; try again") }
            return count
        }
    }
}
