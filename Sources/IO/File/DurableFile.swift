internal import CLinux
internal import Glibc

/// Small files that must survive a crash.
public enum DurableFile {
    /// Replaces a file: its old contents stay until the new ones are on stable storage, with the name.
    ///
    /// - Throws: `FileError` that names the path.
    public static func write(_ bytes: [UInt8], to path: String, mode: UInt32 = 0o600) throws {
        let temporary = "\(path).new-\(getpid())"
        let fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, mode)
        guard fd >= 0 else { throw FileError.system("create \(temporary)", errno) }
        defer { close(fd) }
        do {
            try append(bytes, to: fd, path: temporary)
            guard fsync(fd) == 0 else { throw FileError.system("write \(temporary) to stable storage", errno) }
            guard rename(temporary, path) == 0 else { throw FileError.system("replace \(path)", errno) }
        } catch {
            unlink(temporary)
            throw error
        }
        try syncDirectory(of: path)
    }

    /// Writes all bytes at the descriptor's position.
    public static func append(_ bytes: [UInt8], to fd: Int32, path: String) throws {
        var done = 0
        while done < bytes.count {
            let count = bytes.withUnsafeBytes { Glibc.write(fd, $0.baseAddress! + done, $0.count - done) }
            if count < 0, errno == EINTR { continue }
            guard count > 0 else { throw FileError.system("write \(path)", errno) }
            done += count
        }
    }

    /// Makes a new, renamed or removed name in the path's directory durable.
    public static func syncDirectory(of path: String) throws {
        let parent = path.lastIndex(of: "/").map { String(path[..<$0]) } ?? "."
        let fd = xd_open_directory(parent.isEmpty ? "/" : parent)
        guard fd >= 0 else { throw FileError.system("open the directory \(parent)", errno) }
        defer { close(fd) }
        guard fsync(fd) == 0 else {
            throw FileError.system("write the directory \(parent) to stable storage", errno)
        }
    }

    /// The contents of a file; nil when there is none.
    ///
    /// - Throws: `FileError` for every failure but a missing file, and for a file larger than `limit` bytes.
    public static func read(_ path: String, limit: Int = 64 << 20) throws -> [UInt8]? {
        let fd = open(path, O_RDONLY | O_CLOEXEC)
        guard fd >= 0 else {
            if errno == ENOENT { return nil }
            throw FileError.system("read \(path)", errno)
        }
        defer { close(fd) }
        var bytes: [UInt8] = []
        let piece = IOBuffer(capacity: 64 << 10)
        while true {
            let count = Glibc.read(fd, piece.mutable(0..<piece.capacity).baseAddress, piece.capacity)
            if count < 0, errno == EINTR { continue }
            guard count >= 0 else { throw FileError.system("read \(path)", errno) }
            if count == 0 { return bytes }
            bytes.append(contentsOf: piece.bytes(0..<count))
            if bytes.count > limit { throw FileError("\(path) is larger than \(limit) bytes") }
        }
    }

    /// Makes a new directory, `crossdock-` and something random, that only this user may enter.
    ///
    /// - Parameter parent: where.
    /// - Returns: its path.
    /// - Throws: `FileError` that names the parent.
    public static func makePrivateDirectory(in parent: String) throws -> String {
        var template = Array("\(parent)/crossdock-XXXXXX".utf8CString)
        guard mkdtemp(&template) != nil else { throw FileError.system("make a directory under \(parent)", errno) }
        return String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    /// Makes a directory and its parents, durably and private to their owner; existing ones stay as they are.
    public static func makeDirectory(_ path: String) throws {
        var status = stat()
        if stat(path, &status) == 0 {
            guard status.st_mode & S_IFMT == S_IFDIR else {
                throw FileError("\(path) is in the way: it is not a directory")
            }
            return
        }
        if let slash = path.lastIndex(of: "/"), slash != path.startIndex {
            try makeDirectory(String(path[..<slash]))
        }
        guard mkdir(path, 0o700) == 0 else {
            if errno == EEXIST { return }
            throw FileError.system("make the directory \(path)", errno)
        }
        try syncDirectory(of: path)
    }

    /// The names in a directory, sorted; none when it does not exist.
    public static func list(_ path: String) -> [String] {
        guard let directory = opendir(path) else { return [] }
        defer { closedir(directory) }
        var names: [String] = []
        while let entry = readdir(directory) {
            let name = withUnsafePointer(to: &entry.pointee.d_name) {
                $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
            }
            if name != ".", name != ".." { names.append(name) }
        }
        return names.sorted()
    }

    /// Removes a file or a directory with all that is in it; symbolic links are removed, not followed.
    public static func remove(_ path: String) {
        var status = stat()
        guard lstat(path, &status) == 0 else { return }
        if status.st_mode & S_IFMT == S_IFDIR {
            for name in list(path) { remove("\(path)/\(name)") }
            rmdir(path)
        } else {
            unlink(path)
        }
    }

    /// Whether there is something at the path.
    public static func exists(_ path: String) -> Bool { access(path, F_OK) == 0 }

    /// An absolute path without `.`, `..` and symbolic links; a file that does not exist is taken as it is written.
    public static func resolve(_ path: String, in directory: String) -> String {
        let absolute = path.hasPrefix("/") ? path : "\(directory)/\(path)"
        guard let real = realpath(absolute, nil) else { return absolute }
        defer { free(real) }
        return String(cString: real)
    }
}
