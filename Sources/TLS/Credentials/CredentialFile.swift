internal import Glibc

/// The files of a credential directory.
enum CredentialFile {
    /// How large a file may be.
    static let limit = 1 << 20

    /// What follows the name of an identity's files: nothing for the first, a number for each further one.
    static let identitySuffixes = [""] + (0..<16).map { "-\($0)" }

    /// The path of a file that must be there and readable.
    static func require(_ directory: String, _ name: String) throws -> String {
        guard let path = try find(directory, name) else {
            throw CredentialError(
                "Unable to access credentials \(directory)/\(name): No such file or directory; "
                    + "make it with 'crossdock pki' or point 'dir=' at the right directory"
            )
        }
        return path
    }

    /// The path of a file that may be missing, but must be a readable plain file when it is there.
    static func find(_ directory: String, _ name: String) throws -> String? {
        let path = "\(directory)/\(name)"
        var status = stat()
        guard stat(path, &status) == 0 else {
            if errno == ENOENT { return nil }
            throw CredentialError("Unable to access credentials \(path): \(String(cString: strerror(errno)))")
        }
        guard status.st_mode & S_IFMT == S_IFREG else {
            throw CredentialError("Unable to access credentials \(path): it is not a plain file")
        }
        guard access(path, R_OK) == 0 else {
            throw CredentialError("Unable to access credentials \(path): \(String(cString: strerror(errno)))")
        }
        return path
    }

    /// The contents of a plain file of at most 1 MiB.
    static func contents(_ path: String) throws -> [UInt8] {
        // O_NONBLOCK: a FIFO that took the file's place must not make the open wait.
        let fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
        guard fd >= 0 else { throw CredentialError("Cannot read \(path): \(String(cString: strerror(errno)))") }
        defer { close(fd) }
        var status = stat()
        guard fstat(fd, &status) == 0, status.st_mode & S_IFMT == S_IFREG else {
            throw CredentialError("Cannot read \(path): it is not a plain file")
        }
        guard status.st_size < limit else {
            throw CredentialError("\(path) is larger than 1 MiB, which no credential is")
        }
        var bytes = [UInt8](repeating: 0, count: Int(status.st_size) + 1)
        var total = 0
        while total < bytes.count {
            let count = bytes.withUnsafeMutableBytes { Glibc.read(fd, $0.baseAddress! + total, $0.count - total) }
            if count < 0 { throw CredentialError("Cannot read \(path): \(String(cString: strerror(errno)))") }
            if count == 0 { return Array(bytes[..<total]) }
            total += count
        }
        throw CredentialError("\(path) changed while it was read; try again")
    }

    /// The contents of a file with a key, of at most 1 MiB, on wiped memory.
    static func secretContents(_ path: String) throws -> SecretBytes {
        var status = stat()
        guard stat(path, &status) == 0, status.st_mode & S_IFMT == S_IFREG else {
            throw CredentialError("Cannot read \(path): it is not a plain file")
        }
        return try SecretSource.file(path)
    }

    /// A warning when others than the owner and its group may read or change a file that holds keys.
    static func exposure(_ path: String) -> String? {
        var status = stat()
        guard stat(path, &status) == 0, status.st_mode & 0o006 != 0 else { return nil }
        return "\(path) holds a key and everybody on this host can read or change it; run: chmod 600 \(path)"
    }
}
