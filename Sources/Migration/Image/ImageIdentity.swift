package import CLinux
internal import Glibc
internal import IO

/// Which file or device it is, whatever it is called.
public enum ImageIdentity: Sendable, Hashable, Codable {
    /// A file: the number of its file system, and its own there.
    case file(system: UInt64, inode: UInt64)
    /// A block device, by its number; how many names it has does not matter.
    case device(UInt64)

    /// What a name leads to; nil when that is neither a file nor a block device.
    package init?(_ found: xd_identity) {
        switch found.mode & S_IFMT {
        case S_IFREG: self = .file(system: found.device, inode: found.inode)
        case S_IFBLK: self = .device(found.special)
        default: return nil
        }
    }

    /// What a path leads to; nil when there is no such file or device.
    public init?(of path: String) {
        guard let found = xd_identity(at: AT_FDCWD, path) else { return nil }
        self.init(found)
    }

    /// Whether it is a block device.
    public var isDevice: Bool {
        if case .device = self { true } else { false }
    }

    /// The files and devices that a process has open.
    ///
    /// - Throws: `FileError` when this user may not look.
    package static func open(in process: Int32) throws -> Set<ImageIdentity> {
        let path = "/proc/\(process)/fd"
        guard let directory = opendir(path) else { throw FileError.system("read \(path)", errno) }
        defer { closedir(directory) }
        var found: Set<ImageIdentity> = []
        while let entry = readdir(directory) {
            let identity = withUnsafePointer(to: &entry.pointee.d_name) {
                $0.withMemoryRebound(to: CChar.self, capacity: 256) { name in
                    var found = xd_identity()
                    guard name[0] != CChar(UInt8(ascii: ".")), xd_identify(dirfd(directory), name, 1, &found) == 0
                    else {
                        return ImageIdentity?.none
                    }
                    return ImageIdentity(found)
                }
            }
            if let identity { found.insert(identity) }
        }
        return found
    }
}

extension xd_identity {
    /// What a name leads to; nil when there is nothing, with `errno`.
    package init?(at directory: Int32, _ name: String, following: Bool = true) {
        self.init()
        guard xd_identify(directory, name, following ? 1 : 0, &self) == 0 else { return nil }
    }
}
