internal import CLinux
internal import Glibc
internal import IO
internal import Migration

/// An image that a guest left behind here, on its way to be the beginning of the same disk, and perhaps back.
///
/// It is used in place: it gets the name of the image that the migration fills, and is an old copy no more. What is written here goes into
/// `incoming.json` before anything is done, so that a later agent can undo it. The calls block for as long as the file system takes.
struct OldImage: Codable, Sendable {
    /// Its fenced name.
    var origin: String
    /// The migration by which the guest left.
    var migration: String
    /// What it is known by.
    var lineage: Lineage
    /// Whose it was, and who might use it.
    var owner: UInt32
    var group: UInt32
    var mode: UInt32

    /// Looks at what may be such an image.
    ///
    /// - Parameters:
    ///   - origin: its fenced name.
    ///   - migration: the migration by which the guest left.
    ///   - lineage: what it is known by.
    ///   - size: the disk's size in bytes.
    ///   - directory: where images are filled.
    /// - Throws: `FileError` that says why it cannot be one.
    init(_ origin: String, of migration: String, _ lineage: Lineage, size: UInt64, for directory: String) throws {
        (self.origin, self.migration, self.lineage) = (origin, migration, lineage)
        let fd = Glibc.open(origin, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)
        guard fd >= 0 else { throw FileError.system("open the old image \(origin)", errno) }
        defer { close(fd) }
        var status = stat()
        guard fstat(fd, &status) == 0, status.st_mode & S_IFMT == S_IFREG else {
            throw FileError("The old image \(origin) is no file")
        }
        guard status.st_nlink == 1 else { throw FileError("The old image \(origin) has another name as well") }
        guard UInt64(status.st_size) == size else {
            throw FileError("The old image \(origin) has \(status.st_size) bytes, and the disk has \(size)")
        }
        var place = stat()
        guard stat(directory, &place) == 0, place.st_dev == status.st_dev else {
            throw FileError(
                "The old image \(origin) is not in the file system of \(directory), and cannot be used in place"
            )
        }
        let number = Self.openness(fd, status.st_uid)
        guard number == 0 else {
            throw FileError(
                number == EAGAIN
                    ? "Another process has the old image \(origin) open"
                    : "Whether another process has the old image \(origin) open cannot be known: \(String(cString: strerror(number)))"
            )
        }
        (owner, group, mode) = (status.st_uid, status.st_gid, status.st_mode & 0o7777)
    }

    /// Whether nobody else has a file open: 0, EAGAIN when somebody has, another number when that cannot be known.
    private static func openness(_ fd: Int32, _ owner: UInt32) -> Int32 {
        if xd_is_only_opener(fd) == 0 { return 0 }
        let number = errno
        guard number == EACCES, owner != geteuid() else { return number }
        // A lease is for the file's user; the unit takes CAP_LEASE away, and leaves what it takes to be that user for a moment.
        guard fchown(fd, geteuid(), gid_t.max) == 0 else { return number }
        let second = xd_is_only_opener(fd) == 0 ? 0 : errno
        return fchown(fd, owner, gid_t.max) == 0 ? second : errno
    }
}

/// An old image with the name of the image that a migration fills, or about to get it.
struct PlacedImage: Sendable {
    let image: OldImage
    /// The name of the image that is filled.
    let path: String
    /// The files of the migration by which the guest left.
    let files: MigrationFiles

    /// Gives it that name, which must be free.
    ///
    /// - Throws: `FileError` that says why not; then nothing has changed.
    func place() throws {
        let origin = image.origin
        guard xd_rename_no_replace(AT_FDCWD, origin, AT_FDCWD, path) == 0 else {
            throw FileError.system("rename the old image \(origin) to \(path)", errno)
        }
        do {
            var status = stat()
            guard lstat(path, &status) == 0, status.st_nlink == 1 else {
                throw FileError("The old image \(origin) has another name as well")
            }
            // Whoever gets it next is another user.
            try Self.restrict(path, to: geteuid(), getegid(), 0o600)
            if var record = FencedRecord(of: files) {
                record.remove(origin)
                try record.save(files)
            }
            try DurableFile.syncDirectory(of: path)
            try DurableFile.syncDirectory(of: origin)
        } catch {
            giveBack()
            throw error
        }
    }

    /// Makes an old copy of it again. Its bytes may be others by now; its lineage stays true, since a table is always made by reading.
    /// May be done again, and before `place`.
    ///
    /// - Returns: why that is not possible; nil when it is done.
    @discardableResult
    func giveBack() -> String? {
        let origin = image.origin
        if DurableFile.exists(path) {
            if DurableFile.exists(origin) {
                // It never had this name: what has it was made anew.
                unlink(path)
            } else if xd_rename_no_replace(AT_FDCWD, path, AT_FDCWD, origin) != 0 {
                return "Cannot give the old image \(path) its name \(origin) back: \(String(cString: strerror(errno)))"
            }
        }
        guard DurableFile.exists(origin) else { return nil }
        do {
            try Self.restrict(origin, to: image.owner, image.group, image.mode)
            var record = FencedRecord(of: files) ?? FencedRecord(paths: [], deleteAfter: nil)
            record.add(origin, image.lineage)
            try record.save(files)
            try DurableFile.syncDirectory(of: path)
            try DurableFile.syncDirectory(of: origin)
        } catch { return "\(error)" }
        return nil
    }

    private static func restrict(_ path: String, to user: UInt32, _ group: UInt32, _ mode: UInt32) throws {
        let fd = Glibc.open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)
        guard fd >= 0 else { throw FileError.system("open the old image \(path)", errno) }
        defer { close(fd) }
        guard fchown(fd, user, group) == 0, fchmod(fd, mode) == 0 else {
            throw FileError.system("give the old image \(path) to its user", errno)
        }
    }
}
