internal import CLinux
internal import Glibc
internal import IO

/// An image of this host's operator, below one of the directories that a source may use: the beginning of a disk, which gets a copy of it.
struct SeedTemplate: Sendable {
    let directories: [String]
    let name: String

    /// Looks whether it is one. Blocks.
    ///
    /// - Throws: `FileError` that says what is wrong with it.
    func check(size: UInt64) throws { close(try open(size)) }

    private func open(_ size: UInt64) throws -> Int32 {
        var fd: Int32 = -1
        var number = ENOENT
        for directory in directories where fd < 0 {
            let root = xd_open_directory(directory)
            guard root >= 0 else { continue }
            defer { close(root) }
            // Whatever the source writes, it leads to nothing outside.
            fd = xd_open_beneath(root, name)
            if fd < 0, errno != ENOENT { number = errno }
        }
        guard fd >= 0 else { throw FileError.system("open the seed '\(name)'", number) }
        var status = stat()
        guard fstat(fd, &status) == 0, status.st_mode & S_IFMT == S_IFREG, UInt64(status.st_size) == size else {
            close(fd)
            throw FileError("The seed '\(name)' is no raw image of \(size) bytes, as the disk is")
        }
        return fd
    }

    /// Makes an image of it: one that shares its blocks where the file system can, a copy elsewhere. Blocks, perhaps for long.
    ///
    /// - Parameters:
    ///   - path: the image, which must not exist.
    ///   - shouldStop: is asked now and then.
    /// - Throws: `FileError`; then nothing is left of it.
    func copy(to path: String, size: UInt64, shouldStop: () -> Bool) throws {
        let source = try open(size)
        defer { close(source) }
        let target = xd_open_create_exclusive(path)
        guard target >= 0 else { throw FileError.system("create the image \(path)", errno) }
        defer { close(target) }
        do {
            if xd_clone(target, source) != 0 { try Self.copy(source, target, path, size, shouldStop) }
            // It must have all of its size whatever became of its source meanwhile.
            guard ftruncate(target, off_t(size)) == 0 else {
                throw FileError.system("make the image \(path) \(size) bytes long", errno)
            }
            try DurableFile.syncDirectory(of: path)
        } catch {
            unlink(path)
            throw error
        }
    }

    /// Copies what is data, so that holes stay holes.
    private static func copy(
        _ source: Int32,
        _ target: Int32,
        _ path: String,
        _ size: UInt64,
        _ shouldStop: () -> Bool
    ) throws {
        var position: off_t = 0
        while true {
            let start = xd_seek_data(source, position)
            if start < 0, errno == ENXIO { return }
            let found = start < 0 ? position : start
            let hole = start < 0 ? off_t(size) : xd_seek_hole(source, found)
            let end = min(hole < 0 ? off_t(size) : hole, off_t(size))
            if found >= end { return }
            var done = found
            while done < end {
                if shouldStop() { throw FileError("Copying to \(path) was given up") }
                let count = xd_copy_range(source, target, done, min(Int(end - done), 8 << 20))
                if count < 0, errno == EINTR { continue }
                guard count >= 0 else { throw FileError.system("copy to \(path)", errno) }
                // It became shorter meanwhile.
                if count == 0 { return }
                done += off_t(count)
            }
            position = end
        }
    }
}
