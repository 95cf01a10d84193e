internal import CLinux
internal import Glibc
internal import IO

/// The block device that a guest has as a disk, and who else than its owner may use it.
///
/// A guest's user is let in by an entry of the device's access control list (acl(5)), so that owner and group stay what udev and the
/// operator made them, and nothing has to be given back but that entry. Where a file system has no such lists, the device changes its
/// owner.
public enum GuestDevice {
    /// The device that a disk's path means; nil when it means none.
    ///
    /// A link counts when this process's user has made it: one that a guest's user has made leads to nothing that is meant.
    public static func path(of disk: String) -> String? {
        var status = stat()
        guard lstat(disk, &status) == 0 else { return nil }
        let isLink = status.st_mode & S_IFMT == S_IFLNK
        if isLink {
            guard status.st_uid == geteuid(), stat(disk, &status) == 0 else { return nil }
        }
        guard status.st_mode & S_IFMT == S_IFBLK else { return nil }
        return isLink ? DurableFile.resolve(disk, in: "/") : disk
    }

    /// Lets a user read and write a device, and takes that right from the users of earlier guests.
    ///
    /// - Throws: `FileError`.
    static func admit(_ user: UInt32, to device: String) throws {
        var status = stat()
        guard lstat(device, &status) == 0, status.st_uid != user else { return }
        let list = AccessList(of: device) ?? AccessList(mode: status.st_mode)
        if list.admitting(user).write(to: device) { return }
        guard errno == ENOTSUP else { throw FileError.system("let the user \(user) use \(device)", errno) }
        guard lchown(device, user, user) == 0 else {
            throw FileError.system("give \(device) to the user \(user)", errno)
        }
    }

    /// Takes from the users of guests what `admit` gave them.
    public static func withdraw(_ device: String) {
        guard let list = AccessList(of: device) else { return }
        list.withoutUsers.write(to: device)
    }

    /// The users who were let in.
    static func users(of device: String) -> [UInt32] { AccessList(of: device)?.users ?? [] }
}

/// An access control list as the kernel keeps it in `system.posix_acl_access` (linux/posix_acl_xattr.h).
private struct AccessList {
    private enum Tag: UInt16 {
        case owner = 0x01
        case user = 0x02
        case owningGroup = 0x04
        case group = 0x08
        case mask = 0x10
        case others = 0x20
    }
    private struct Entry {
        var tag: UInt16
        var rights: UInt16
        var id: UInt32 = .max
    }
    private static let attribute = "system.posix_acl_access"
    private static let version: UInt32 = 2
    private static let readAndWrite: UInt16 = 6

    private var entries: [Entry]

    /// What a mode says.
    init(mode: mode_t) {
        entries = [
            Entry(tag: Tag.owner.rawValue, rights: UInt16(mode >> 6 & 7)),
            Entry(tag: Tag.owningGroup.rawValue, rights: UInt16(mode >> 3 & 7)),
            Entry(tag: Tag.others.rawValue, rights: UInt16(mode & 7)),
        ]
    }

    /// That of a file; nil when it has none beyond its mode.
    init?(of path: String) {
        var bytes = [UInt8](repeating: 0, count: 4096)
        let count = getxattr(path, Self.attribute, &bytes, bytes.count)
        guard count >= 4, (count - 4) % 8 == 0 else { return nil }
        entries = bytes.withUnsafeBytes { raw in
            stride(from: 4, to: count, by: 8).map { at in
                Entry(
                    tag: UInt16(littleEndian: raw.loadUnaligned(fromByteOffset: at, as: UInt16.self)),
                    rights: UInt16(littleEndian: raw.loadUnaligned(fromByteOffset: at + 2, as: UInt16.self)),
                    id: UInt32(littleEndian: raw.loadUnaligned(fromByteOffset: at + 4, as: UInt32.self))
                )
            }
        }
    }

    var users: [UInt32] { entries.filter { $0.tag == Tag.user.rawValue }.map(\.id) }

    /// The same with no user by name. The owning group keeps what it had: a mask limits it only as long as it is there.
    var withoutUsers: AccessList {
        var list = self
        list.entries.removeAll { $0.tag == Tag.user.rawValue }
        if !list.entries.contains(where: { $0.tag == Tag.group.rawValue }) {
            list.entries.removeAll { $0.tag == Tag.mask.rawValue }
        }
        return list
    }

    /// The same with one user by name.
    func admitting(_ user: UInt32) -> AccessList {
        var list = withoutUsers
        list.entries.append(Entry(tag: Tag.user.rawValue, rights: Self.readAndWrite, id: user))
        if let mask = list.entries.firstIndex(where: { $0.tag == Tag.mask.rawValue }) {
            list.entries[mask].rights |= Self.readAndWrite
        } else {
            let group = list.entries.first { $0.tag == Tag.owningGroup.rawValue }
            list.entries.append(Entry(tag: Tag.mask.rawValue, rights: Self.readAndWrite | (group?.rights ?? 0)))
        }
        // The kernel wants them in the order of their tags.
        list.entries.sort { ($0.tag, $0.id) < ($1.tag, $1.id) }
        return list
    }

    /// Makes it that of a file; false with errno when the kernel does not take it.
    @discardableResult
    func write(to path: String) -> Bool {
        var bytes: [UInt8] = []
        func append(_ value: some FixedWidthInteger) {
            withUnsafeBytes(of: value.littleEndian) { bytes.append(contentsOf: $0) }
        }
        append(Self.version)
        for entry in entries {
            append(entry.tag)
            append(entry.rights)
            append(entry.id)
        }
        return setxattr(path, Self.attribute, bytes, bytes.count, 0) == 0
    }
}
