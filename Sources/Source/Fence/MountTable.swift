internal import CLinux
internal import Glibc
internal import IO
internal import Migration

/// What is mounted where, as a process sees it (`/proc/PID/mountinfo`).
struct MountTable {
    struct Mount {
        /// The number of the file system, or of the device that it is on.
        var device: UInt64
        /// What part of the file system is mounted: "/", or a directory or file of it.
        var root: String
        /// Where.
        var point: String
        /// The kind of file system.
        var type: String
    }

    let mounts: [Mount]

    /// Reads the table of a process, of this one when nil; nil when this user may not.
    init?(of process: Int32? = nil) {
        let path = "/proc/\(process.map { String($0) } ?? "self")/mountinfo"
        guard let bytes = (try? DurableFile.read(path)) ?? nil else { return nil }
        self.init(parsing: bytes)
    }

    init(parsing bytes: [UInt8]) {
        mounts = bytes.split(separator: UInt8(ascii: "\n")).compactMap { line in
            let fields = line.split(separator: UInt8(ascii: " ")).map { Array($0) }
            guard fields.count > 6, let dash = fields.firstIndex(of: [UInt8(ascii: "-")]), dash + 1 < fields.count
            else {
                return nil
            }
            let numbers = String(decoding: fields[2], as: UTF8.self).split(separator: ":").compactMap { UInt32($0) }
            guard numbers.count == 2 else { return nil }
            return Mount(
                device: xd_device_number(numbers[0], numbers[1]),
                root: Self.text(fields[3]),
                point: Self.text(fields[4]),
                type: Self.text(fields[dash + 1])
            )
        }
    }

    /// Where single files of the image's file system are mounted that are the image.
    ///
    /// - Parameters:
    ///   - image: the file.
    ///   - root: what the mount points begin from: "/proc/PID/root" for those of another process.
    func points(of image: ImageIdentity, under root: String = "") -> [String] {
        guard case .file(let system, _) = image else { return [] }
        return mounts.filter { mount in
            // btrfs has numbers of its own for what it contains.
            mount.root != "/" && (mount.device == system || mount.type == "btrfs")
                && ImageIdentity(of: root + mount.point) == image
        }.map(\.point)
    }

    /// Blanks and the like are written as three octal digits.
    private static func text(_ field: [UInt8]) -> String {
        var result: [UInt8] = []
        var index = 0
        while index < field.count {
            let digits = field[min(index + 1, field.count)..<min(index + 4, field.count)]
            if field[index] == UInt8(ascii: "\\"), digits.count == 3, digits.allSatisfy({ $0 >= 48 && $0 <= 55 }) {
                result.append(digits.reduce(0) { $0 &* 8 &+ ($1 - 48) })
                index += 4
            } else {
                result.append(field[index])
                index += 1
            }
        }
        return String(decoding: result, as: UTF8.self)
    }
}
