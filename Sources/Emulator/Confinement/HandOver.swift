internal import Glibc
internal import IO

/// Gives files and directories to the user of a confined program, before it starts.
public enum HandOver {
    /// Gives everything that a confinement names to its user.
    static func carryOut(_ confinement: Confinement) throws {
        guard let user = confinement.user else { return }
        for path in confinement.ownFiles {
            guard let parent = path.lastIndex(of: "/").map({ String(path[..<$0]) }) else { continue }
            for root in confinement.roots where parent == root || parent.hasPrefix(root + "/") {
                open(parent, upTo: root)
            }
        }
        for path in confinement.ownFiles { try give(path, to: user) }
    }

    /// The groups through which devices may be used: KVM's, that of tap devices.
    static func groups(of devices: [String]) -> [UInt32] {
        groups(of: devices) { $0.st_mode & S_IFMT == S_IFCHR && $0.st_mode & 0o060 == 0o060 }
    }

    /// The groups through which files may be read that not everybody may read.
    static func readers(of files: [String]) -> [UInt32] {
        groups(of: files) { $0.st_mode & S_IFMT == S_IFREG && $0.st_mode & 0o044 == 0o040 }
    }

    /// The groups, but for root's, of those that are there and help.
    private static func groups(of paths: [String], where helps: (stat) -> Bool) -> [UInt32] {
        var found: Set<UInt32> = []
        for path in paths {
            var status = stat()
            guard stat(path, &status) == 0, status.st_gid != 0, helps(status) else { continue }
            found.insert(status.st_gid)
        }
        return found.sorted()
    }

    /// Gives a directory with the files in it, or a file.
    ///
    /// Only what belongs to this process's user is given, and no link is followed: what another guest put there stays its own.
    ///
    /// - Throws: `FileError` that names what could not be given.
    static func give(_ path: String, to user: UInt32) throws {
        var status = stat()
        guard lstat(path, &status) == 0 else { return }
        if let device = GuestDevice.path(of: path) { return try GuestDevice.admit(user, to: device) }
        // Only a device is meant by a link: the image of a guest that has one.
        if status.st_mode & S_IFMT == S_IFLNK { return }
        if status.st_mode & S_IFMT == S_IFDIR {
            for name in DurableFile.list(path) {
                let entry = "\(path)/\(name)"
                guard lstat(entry, &status) == 0, status.st_mode & S_IFMT != S_IFDIR else { continue }
                try give(entry, to: user)
            }
            return try change(path, to: user)
        }
        let isShared = status.st_mode & S_IFMT == S_IFREG && status.st_nlink != 1
        if !isShared { try change(path, to: user) }
    }

    /// Makes a directory in one that belongs to a user, who may have put something else in its place, and gives it to that user.
    ///
    /// - Throws: `FileError` when it cannot be made or given, or when something else is there.
    public static func makeDirectory(_ path: String, for user: UInt32) throws {
        guard mkdir(path, 0o700) == 0 || errno == EEXIST else {
            throw FileError.system("make the directory \(path)", errno)
        }
        let descriptor = Glibc.open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
        guard descriptor >= 0 else { throw FileError.system("open the directory \(path)", errno) }
        defer { close(descriptor) }
        guard user == geteuid() || fchown(descriptor, user, gid_t.max) == 0 else {
            throw FileError.system("give \(path) to the user that QEMU runs as", errno)
        }
    }

    private static func change(_ path: String, to user: UInt32) throws {
        var status = stat()
        guard lstat(path, &status) == 0, status.st_uid != user else { return }
        guard lchown(path, user, user) == 0 else { throw FileError.system("give \(path) to the user \(user)", errno) }
    }

    /// Lets others pass through the directories of this user from a path up to a root, but not list them.
    static func open(_ path: String, upTo root: String) {
        var current = path
        while current == root || current.hasPrefix(root + "/") {
            var status = stat()
            if stat(current, &status) == 0, status.st_uid == geteuid(), status.st_mode & S_IFMT == S_IFDIR,
                status.st_mode & 0o001 == 0
            {
                chmod(current, (status.st_mode & 0o7777) | 0o001)
            }
            guard let slash = current.lastIndex(of: "/"), slash != current.startIndex else { return }
            current = String(current[..<slash])
        }
    }

    /// The first directory above a path through which others cannot pass; nil when there is none.
    static func closedDirectory(above path: String) -> String? {
        var current = ""
        for part in path.split(separator: "/").dropLast() {
            current += "/\(part)"
            var status = stat()
            guard stat(current, &status) == 0 else { return nil }
            if status.st_mode & 0o001 == 0 { return current }
        }
        return nil
    }
}
