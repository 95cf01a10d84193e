internal import CLinux
internal import Emulator
internal import Glibc
internal import IO
internal import Migration

/// Who has a guest's images open besides its own QEMU, whether or not they lock them.
///
/// Found by the open files of every process, by what is attached to them in the kernel (loop devices, device mapper, swap,
/// mounts) and, for a block device, by its partitions and the disk that it is a part of.
public struct ImageUsers: Sendable {
    /// A process with an image open.
    public struct User: Sendable, Hashable {
        /// The process.
        public var process: Int32
        /// Its program's name.
        public var program: String
        /// The guest that it runs, if it is one of this host.
        public var guest: String?
        /// The image, as the guest that is to leave names it.
        public var image: String
    }

    /// The processes.
    public private(set) var users: [User] = []
    /// What else uses an image, a sentence each.
    public private(set) var claims: [String] = []
    /// The processes that this user may not look at, with the names of their programs.
    public internal(set) var unseen: [(process: Int32, program: String)] = []

    /// Why the images cannot be taken away, a sentence each, with what to do. Empty when nobody was seen.
    public var obstacles: [String] {
        claims
            + users.map { user in
                let who =
                    user.guest.map { "guest '\($0)' (process \(user.process))" }
                    ?? "\(user.program) (process \(user.process))"
                return "The image \(user.image) is open in \(who) too, which would go on with an image that has left; "
                    + (user.guest == nil ? "end that first" : "give each guest a disk of its own, or stop one of them")
            }
    }

    /// What an operator has to know who may not look everywhere; nil when everybody was seen.
    public var note: String? {
        guard !unseen.isEmpty else { return nil }
        let named = unseen.prefix(3).map { "\($0.program) (process \($0.process))" }.joined(separator: ", ")
        let others =
            switch unseen.count - 3 {
            case ...0: ""
            case 1: " and one other process"
            case let count: " and \(count) other processes"
            }
        let verb = unseen.count > 1 ? "have" : "has"
        let advice =
            geteuid() == 0 ? "it is kept from root too, see that it does not use them" : "root can see that"
        return
            "Whether \(named)\(others) \(verb) the guest's images open could not be seen, since this user may not look at it; \(advice)"
    }

    /// A file or device to look for, and the image that it belongs to.
    private struct Target {
        var identity: ImageIdentity
        var image: String
        /// Whether readers are none of its business: it is the whole disk of which the image is a part.
        var isWhole = false
    }

    /// Looks for users.
    ///
    /// - Parameters:
    ///   - images: what they may use.
    ///   - ignored: processes that may: the guest's QEMU. This one and what it has started may as well.
    ///   - areHeld: whether devices are claimed by this program.
    ///   - guests: the guests of this host, for their names.
    static func find(
        _ images: [FencedImage],
        ignoring ignored: Set<Int32>,
        areHeld: Bool = false,
        guests: GuestStore
    ) -> ImageUsers {
        var result = ImageUsers()
        var targets: [Target] = []
        for image in images {
            guard let identity = image.identity else { continue }
            targets.append(Target(identity: identity, image: image.path))
            result.claims += attached(to: image, identity)
            if case .device(let number) = identity {
                let device = BlockDevice(number)
                for part in device.partitions { targets.append(Target(identity: .device(part), image: image.path)) }
                if let whole = device.whole {
                    targets.append(Target(identity: .device(whole), image: image.path, isWhole: true))
                }
                result.claims += device.claims(of: image.path, areHeld: areHeld)
            }
        }
        result.scan(targets, ignored.union([getpid()]), guests)
        return result
    }

    // MARK: Processes

    /// Looks at every descriptor of every process. Nothing is allocated for one that is of no interest.
    private mutating func scan(_ targets: [Target], _ ignored: Set<Int32>, _ guests: GuestStore) {
        guard !targets.isEmpty, let processes = opendir("/proc") else { return }
        defer { closedir(processes) }
        let path = UnsafeMutablePointer<CChar>.allocate(capacity: 32)
        defer { path.deallocate() }
        while let entry = readdir(processes) {
            let pid = withUnsafePointer(to: &entry.pointee.d_name) {
                $0.withMemoryRebound(to: CChar.self, capacity: 256) { Self.process($0, path) }
            }
            guard let pid, !ignored.contains(pid) else { continue }
            let descriptor = openat(dirfd(processes), path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
            guard descriptor >= 0 else {
                if errno == EACCES || errno == EPERM { miss(pid) }
                continue
            }
            guard let directory = fdopendir(descriptor) else {
                close(descriptor)
                continue
            }
            defer { closedir(directory) }
            look(in: directory, of: pid, targets, guests)
        }
    }

    private mutating func miss(_ pid: Int32) {
        guard !Self.isKernelThread(pid) else { return }
        let program = Self.program(pid)
        unseen.append((pid, program.isEmpty ? "a program" : program))
    }

    private mutating func look(in directory: OpaquePointer, of pid: Int32, _ targets: [Target], _ guests: GuestStore) {
        var seen: Set<Int> = []
        var found = xd_identity()
        while let entry = readdir(directory) {
            let result = withUnsafePointer(to: &entry.pointee.d_name) {
                $0.withMemoryRebound(to: CChar.self, capacity: 256) { name in
                    name[0] == CChar(UInt8(ascii: ".")) ? 1 : xd_identify(dirfd(directory), name, 1, &found)
                }
            }
            if result < 0, errno == EACCES || errno == EPERM {
                miss(pid)
                return
            }
            guard result == 0, let identity = ImageIdentity(found) else { continue }
            for (index, target) in targets.enumerated() where target.identity == identity && !seen.contains(index) {
                let name = withUnsafePointer(to: &entry.pointee.d_name) {
                    $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
                }
                if target.isWhole, !Self.isWriter(pid, name) { continue }
                guard !Self.isOwnChild(pid) else { continue }
                seen.insert(index)
                users.append(
                    User(process: pid, program: Self.program(pid), guest: Self.guest(pid, guests), image: target.image)
                )
            }
        }
    }

    /// The number of a process that an entry of /proc is about, with `NUMBER/fd` put into `path`; nil for other entries.
    private static func process(_ name: UnsafePointer<CChar>, _ path: UnsafeMutablePointer<CChar>) -> Int32? {
        var pid: Int32 = 0
        var length = 0
        while name[length] != 0 {
            let digit = Int32(name[length]) - 48
            guard (0...9).contains(digit), length < 9 else { return nil }
            pid = pid * 10 + digit
            path[length] = name[length]
            length += 1
        }
        for (index, byte) in [47, 102, 100, 0].enumerated() { path[length + index] = CChar(byte) }
        return length > 0 ? pid : nil
    }

    private static func statistics(_ pid: Int32) -> [String] {
        guard let bytes = (try? DurableFile.read("/proc/\(pid)/stat")) ?? nil,
            let close = bytes.lastIndex(of: UInt8(ascii: ")")), close + 2 < bytes.count
        else { return [] }
        return bytes[(close + 2)...].split(separator: UInt8(ascii: " ")).map { String(decoding: $0, as: UTF8.self) }
    }

    /// One of the kernel's own, which has no files (PF_KTHREAD).
    private static func isKernelThread(_ pid: Int32) -> Bool {
        let fields = statistics(pid)
        return fields.count > 6 && (UInt64(fields[6]) ?? 0) & 0x20_0000 != 0
    }

    /// What reads an image for this process.
    private static func isOwnChild(_ pid: Int32) -> Bool {
        var pid = pid
        for _ in 0..<8 {
            let fields = statistics(pid)
            guard fields.count > 1, let parent = Int32(fields[1]), parent > 1 else { return false }
            if parent == getpid() { return true }
            pid = parent
        }
        return false
    }

    private static func isWriter(_ pid: Int32, _ descriptor: String) -> Bool {
        guard let bytes = (try? DurableFile.read("/proc/\(pid)/fdinfo/\(descriptor)")) ?? nil else { return true }
        for line in String(decoding: bytes, as: UTF8.self).split(separator: "\n") where line.hasPrefix("flags:") {
            let flags = Int32(line.dropFirst(6).filter(\.isNumber), radix: 8) ?? O_RDWR
            return flags & O_ACCMODE != O_RDONLY
        }
        return true
    }

    private static func program(_ pid: Int32) -> String {
        let name = (try? DurableFile.read("/proc/\(pid)/comm")) ?? nil
        return String(decoding: name?.filter { $0 >= 32 } ?? [], as: UTF8.self)
    }

    private static func guest(_ pid: Int32, _ guests: GuestStore) -> String? {
        guests.names().first { (try? guests.load($0))??.process.map { $0.pid == pid && $0.isRunning } ?? false }
    }

    // MARK: The kernel

    /// The loop devices and the swap that an image is used for.
    private static func attached(to image: FencedImage, _ identity: ImageIdentity) -> [String] {
        var claims: [String] = []
        if !identity.isDevice {
            for name in DurableFile.list("/sys/block") where name.hasPrefix("loop") {
                guard let path = text("/sys/block/\(name)/loop/backing_file"), ImageIdentity(of: path) == identity
                else { continue }
                claims.append(
                    "The image \(image.path) is attached as /dev/\(name) too; detach that with 'losetup -d /dev/\(name)'"
                )
            }
        }
        for line in (text("/proc/swaps") ?? "").split(separator: "\n").dropFirst() {
            let path = String(line.prefix { $0 != " " && $0 != "\t" })
            if ImageIdentity(of: path) == identity {
                claims.append("The image \(image.path) is swap space of this host; end that with 'swapoff \(path)'")
            }
        }
        return claims
    }

    fileprivate static func text(_ path: String) -> String? {
        guard let bytes = (try? DurableFile.read(path)) ?? nil else { return nil }
        let text = String(decoding: bytes, as: UTF8.self)
        return text.hasSuffix("\n") ? String(text.dropLast()) : text
    }
}

/// What the kernel tells of a block device.
private struct BlockDevice {
    let number: UInt64
    private let directory: String

    init(_ number: UInt64) {
        self.number = number
        directory = DurableFile.resolve("/sys/dev/block/\(xd_device_major(number)):\(xd_device_minor(number))", in: "/")
    }

    private static func number(in directory: String) -> UInt64? {
        let parts = (ImageUsers.text("\(directory)/dev") ?? "").split(separator: ":").compactMap { UInt32($0) }
        return parts.count == 2 ? xd_device_number(parts[0], parts[1]) : nil
    }

    /// Its partitions.
    var partitions: [UInt64] {
        DurableFile.list(directory).compactMap { name in
            DurableFile.exists("\(directory)/\(name)/partition") ? Self.number(in: "\(directory)/\(name)") : nil
        }
    }

    /// The disk of which it is a partition.
    var whole: UInt64? {
        guard DurableFile.exists("\(directory)/partition") else { return nil }
        return Self.number(in: String(directory.prefix(upTo: directory.lastIndex(of: "/") ?? directory.endIndex)))
    }

    /// What the kernel itself does with it or its partitions.
    func claims(of image: String, areHeld: Bool) -> [String] {
        var claims: [String] = []
        let parts = Set(partitions + [number])
        var directories = [directory]
        directories += DurableFile.list(directory).map { "\(directory)/\($0)" }.filter {
            DurableFile.exists("\($0)/partition")
        }
        for holder in directories.flatMap({ DurableFile.list("\($0)/holders") }) {
            claims.append("The device \(image) is a part of /dev/\(holder) on this host; take it out there first")
        }
        for mount in MountTable()?.mounts ?? [] where parts.contains(mount.device) {
            claims.append("The device \(image) is mounted at \(mount.point) on this host; unmount it")
        }
        guard claims.isEmpty, !areHeld else { return claims }
        for part in parts where isClaimed(part, as: image) {
            claims.append(
                "The device \(image) is claimed by this host (a mount elsewhere, a volume group, another program); "
                    + "end that first"
            )
        }
        return claims
    }

    /// Whether somebody has it for himself, asked by the only way that shows a mount in another namespace.
    private func isClaimed(_ part: UInt64, as image: String) -> Bool {
        guard part == number else { return false }
        let descriptor = open(image, O_RDONLY | O_EXCL | O_CLOEXEC)
        guard descriptor < 0 else {
            close(descriptor)
            return false
        }
        return errno == EBUSY
    }
}
