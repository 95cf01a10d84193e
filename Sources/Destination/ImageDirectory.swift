internal import Glibc
internal import IO

/// The directory in which images of guests are made.
enum ImageDirectory {
    /// Sees that it is the one that is meant: one that an operator has named is there, and what is to be mounted on the way to it is.
    ///
    /// - Parameters:
    ///   - path: the directory.
    ///   - stateDirectory: below this it is made when it is missing.
    ///   - table: the file systems that the host shall have mounted.
    /// - Throws: `FileError` with what to do.
    static func prepare(_ path: String, stateDirectory: String, table: String = "/etc/fstab") throws {
        if path.hasPrefix("\(stateDirectory)/") {
            try DurableFile.makeDirectory(path)
        } else if !DurableFile.exists(path) {
            throw FileError(
                "The image directory \(path) is not there; mount what it belongs to, or make it with 'mkdir -p \(path)'"
            )
        }
        var status = stat()
        guard stat(path, &status) == 0, status.st_mode & S_IFMT == S_IFDIR else {
            throw FileError("The image directory \(path) is no directory; name another one with --image-dir")
        }
        if let point = unmounted(above: path, table: table) {
            throw FileError(
                "\(table) mounts a file system at \(point), and it is not mounted: images would be made below that mount point; "
                    + "'mount \(point)' mounts it"
            )
        }
    }

    /// The mount point of a table above a path, or the path itself, at which nothing is mounted.
    private static func unmounted(above path: String, table: String) -> String? {
        let text = String(decoding: ((try? DurableFile.read(table)) ?? nil) ?? [], as: UTF8.self)
        for line in text.split(separator: "\n") where !line.hasPrefix("#") {
            let fields = line.split(whereSeparator: { $0 == " " || $0 == "\t" })
            guard fields.count > 3, fields[1].hasPrefix("/"), fields[1] != "/" else { continue }
            let point = String(fields[1])
            guard path == point || path.hasPrefix("\(point)/") else { continue }
            var (own, parent) = (stat(), stat())
            guard stat(point, &own) == 0, stat("\(point)/..", &parent) == 0 else { return point }
            if own.st_dev == parent.st_dev, own.st_ino != parent.st_ino, !isMountPoint(point) { return point }
        }
        return nil
    }

    /// A directory that is mounted from the same file system has its parent's device number all the same.
    private static func isMountPoint(_ point: String) -> Bool {
        let text = String(decoding: ((try? DurableFile.read("/proc/self/mounts")) ?? nil) ?? [], as: UTF8.self)
        return text.split(separator: "\n").contains { line in
            let fields = line.split(separator: " ")
            return fields.count > 1 && fields[1] == point
        }
    }
}
