internal import CLinux
public import Emulator
internal import Glibc
internal import IO
public import Migration

/// What keeps a guest from being started again where it has left: its images are out of reach.
///
/// A file gets another name, `NAME.released-MIGRATION`, in its own directory. A block device, which has no name of its own,
/// is held by a process (see `DeviceHolder`). Everything here may be done again after a crash at any point: a fence that is
/// up already is fine, and so is one that is down.
///
/// The calls block for as long as the file system takes.
public struct ImageFence: Sendable {
    /// The images: each of them once.
    public let images: [FencedImage]
    private let process: EmulatorProcess?
    private let migration: String
    private let guest: String
    private let holder: DeviceHolder

    /// The fence of a guest that is about to leave.
    ///
    /// - Parameters:
    ///   - images: its images.
    ///   - process: its QEMU; nil when that has ended.
    ///   - guest: its name.
    ///   - migration: the migration.
    ///   - migrations: where that is recorded.
    ///   - program: this program, which a process that holds devices runs.
    public init(
        of images: [FencedImage],
        process: EmulatorProcess?,
        guest: String,
        migration: String,
        in migrations: MigrationStore,
        program: String = DeviceHolder.program
    ) {
        var known: Set<ImageIdentity> = []
        self.images = images.filter { image in image.identity.map { known.insert($0).inserted } ?? true }
        self.process = process
        self.guest = guest
        self.migration = migration
        holder = DeviceHolder(guest: guest, files: migrations.files(of: migration), program: program)
    }

    /// The fence of a migration whose agent has died, from what that has saved.
    public init(
        recovering migration: String,
        guest: String,
        process: EmulatorProcess?,
        in migrations: MigrationStore,
        program: String = DeviceHolder.program
    ) {
        self.init(
            of: SavedDisk.load(migrations.files(of: migration)).flatMap(\.images),
            process: process,
            guest: guest,
            migration: migration,
            in: migrations,
            program: program
        )
    }

    private var devices: [FencedImage] { images.filter(\.isDevice) }
    private var renamed: [FencedImage] { images.filter { !$0.isDevice } }
    /// Where an image is to be found while the fence is up.
    public func path(of image: FencedImage) -> String { image.fencedPath(migration) }
    /// Where the files are while the fence is up: what may be deleted one day.
    public var fencedFiles: [String] { renamed.map { $0.fencedPath(migration) } }

    /// The images that are not where they were any more, a sentence each. Quick.
    ///
    /// A QEMU that takes its images up again after a completed migration opens them by their names: what stands there then is
    /// what the guest goes on with. So this is asked before QEMU lets go of them.
    public func displaced() -> [String] {
        images.filter { $0.identity != nil && !$0.canBe(ImageIdentity(of: $0.realPath)) }.map { image in
            "The image \(image.path) was moved or replaced under guest '\(guest)'; put the right one back under this name"
        }
    }

    // MARK: Before anything begins

    /// Everything for which the fence would fail, or be none: a sentence each, with what to do.
    ///
    /// To find that out a directory with the fenced name is made for a moment beside each image.
    public func check() -> [String] {
        var problems: [String] = []
        if let process, !process.maySignal {
            problems.append(
                "QEMU of guest '\(guest)' (process \(process.pid)) may not be signalled by this user, so it could "
                    + "not be frozen once the guest has left; run this as root or as the user of QEMU"
            )
        }
        var open: Set<ImageIdentity>?
        if let process {
            do { open = try ImageIdentity.open(in: process.pid) } catch {
                problems.append(
                    "Which images QEMU of guest '\(guest)' has open cannot be seen: \(error); run this as root or as "
                        + "the user of QEMU"
                )
            }
        }
        for image in images { problems += obstacles(of: image, open) }
        let limit = Int(XD_MAX_KEPT)
        if devices.count > limit {
            problems.append("Guest '\(guest)' has more than \(limit) block devices; that is too many to hold")
        }
        return problems
    }

    /// What a migration of a guest that runs would refuse for the sake of its images, a sentence each. Blocks.
    public static func obstacles(
        to guest: GuestRecord,
        images: [String],
        guests: GuestStore,
        in migrations: MigrationStore
    ) -> [String] {
        let fence = ImageFence(
            of: images.map { FencedImage($0) },
            process: guest.process,
            guest: guest.name,
            migration: MigrationStore.makeID(),
            in: migrations
        )
        return fence.check() + fence.users(guests, patience: .seconds(1)).obstacles
    }

    /// What the fence cannot promise, a sentence each, for an operator who may know that it does not matter.
    ///
    /// Programs find each other's locks of a device at the device node. QEMU in a container, or of libvirt, has nodes of its own.
    public func warnings() -> [String] {
        guard let process else { return [] }
        return devices.filter { image in
            guard let ours = xd_identity(at: AT_FDCWD, image.path) else { return false }
            return !Self.hasOpen(process.pid, ours)
        }.map { image in
            "QEMU of guest '\(guest)' uses another device node than \(image.path): once the guest has left, the "
                + "device is held against programs that use this one, but not against a QEMU that has a /dev of its own"
        }
    }

    /// Whether a process has a device open by this very node.
    private static func hasOpen(_ process: Int32, _ node: xd_identity) -> Bool {
        let path = "/proc/\(process)/fd"
        return DurableFile.list(path).contains { name in
            guard let found = xd_identity(at: AT_FDCWD, "\(path)/\(name)") else { return false }
            return found.device == node.device && found.inode == node.inode
        }
    }

    private func obstacles(of image: FencedImage, _ open: Set<ImageIdentity>?) -> [String] {
        guard let identity = image.identity else {
            return [
                "The image \(image.path) is neither a file nor a block device on this host, or cannot be looked at, "
                    + "so it cannot be taken out of reach when the guest leaves"
            ]
        }
        var problems: [String] = []
        if ImageIdentity(of: image.path) != identity || open?.contains(identity) == false {
            problems.append(
                "The image \(image.path) was moved or replaced under guest '\(guest)': QEMU has another "
                    + "\(identity.isDevice ? "device" : "file") open than the one there. Put the right one back under this name"
            )
        }
        if identity.isDevice {
            if let problem = DeviceHolder.obstacle(image.path) { problems.append(problem) }
        } else if problems.isEmpty {
            problems += namesakes(of: image, identity)
            if problems.isEmpty { problems += renameObstacles(of: image) }
        }
        return problems
    }

    /// Other ways to the file than the name that is taken away.
    private func namesakes(of image: FencedImage, _ identity: ImageIdentity) -> [String] {
        var problems: [String] = []
        if let found = xd_identity(at: AT_FDCWD, image.realPath), found.links > 1 {
            problems.append(
                "The image \(image.realPath) has \(found.links) names (hard links), and a fence takes away only this "
                    + "one; remove the others: 'find DIRECTORY -samefile \(image.realPath)' finds them"
            )
        }
        let here = MountTable()?.points(of: identity) ?? []
        for point in here {
            problems.append(
                point == image.realPath
                    ? "The image \(point) is a mount point of its own (a bind mount), which cannot be renamed; give "
                        + "the guest the file that is mounted there under its own name"
                    : "The image \(image.realPath) is mounted at \(point) too, where a fence does not reach it; unmount that"
            )
        }
        if let process {
            let root = "/proc/\(process.pid)/root"
            let there = MountTable(of: process.pid)?.points(of: identity, under: root) ?? []
            for point in there where !here.contains(point) {
                problems.append(
                    "The image \(image.realPath) is mounted at \(point) where QEMU of guest '\(guest)' runs, and a "
                        + "fence does not reach it there; give QEMU the directory instead of the single file"
                )
            }
        }
        return problems
    }

    /// Whatever keeps the file from being renamed.
    private func renameObstacles(of image: FencedImage) -> [String] {
        let name = image.fencedName(migration)
        let limit = max(pathconf(image.directory, Int32(_PC_NAME_MAX)), 0)
        if limit > 0, name.utf8.count > limit {
            return [
                "The name of the image \(image.realPath) is too long: with '.released-\(migration)' it has "
                    + "\(name.utf8.count) bytes, and "
                    + "\(limit) are possible there; rename it, in the guest's command line too"
            ]
        }
        let directory = xd_open_directory(image.directory)
        guard directory >= 0 else {
            return [
                "The directory \(image.directory) cannot be read: \(Self.words(errno)); run this as its owner or as root"
            ]
        }
        defer { close(directory) }
        if xd_is_immutable(directory) != 0 {
            return [
                Self.obstacle(
                    "No name can be changed in the directory \(image.directory)",
                    EPERM,
                    isDirectory: true,
                    directory
                )
            ]
        }
        if xd_identity(at: directory, name, following: false) != nil {
            return ["\(image.fencedPath(migration)) is in the way of the image's fence; remove it"]
        }
        // Nothing but a rename knows what every file system and security module will say to a rename. A file never replaces a
        // directory, and whether it might is asked last.
        guard mkdirat(directory, name, 0o700) == 0 else {
            let error = errno
            return [
                Self.obstacle(
                    "No name can be made in the directory \(image.directory)",
                    error,
                    isDirectory: true,
                    directory
                )
            ]
        }
        defer { unlinkat(directory, name, AT_REMOVEDIR) }
        guard renameat(directory, image.name, directory, name) != 0 else {
            _ = renameat(directory, name, directory, image.name)
            return ["The file system of \(image.realPath) replaces directories by files; put the image elsewhere"]
        }
        let error = errno
        guard error != EISDIR else { return [] }
        let file = open(image.realPath, O_RDONLY | O_NONBLOCK | O_CLOEXEC)
        defer { if file >= 0 { close(file) } }
        return [Self.obstacle("The image \(image.realPath) cannot be renamed", error, isDirectory: false, file)]
    }

    private static func obstacle(_ what: String, _ error: Int32, isDirectory: Bool, _ descriptor: Int32) -> String {
        let advice =
            switch error {
            case EROFS: "its file system is read-only; make it writable"
            case EPERM where descriptor >= 0 && xd_is_immutable(descriptor) != 0:
                "it is immutable or append-only; 'chattr -i -a' changes that"
            case EPERM where !isDirectory:
                "its directory is sticky and neither is this user's, or is immutable or append-only; run this as the "
                    + "image's owner, or 'chmod -t' or 'chattr -i -a' the directory"
            case EACCES: "this user may not write to the directory; run this as its owner or as root"
            case ENOSPC, EDQUOT: "the file system is full; make room"
            case EBUSY: "it is a mount point; give the guest the file that is mounted there under its own name"
            default: "\(words(error))"
            }
        return "\(what), which its fence needs when the guest leaves: \(advice)"
    }

    private static func words(_ error: Int32) -> String { String(cString: strerror(error)) }

    /// Who else has an image open, which forbids to fence it. Blocks.
    ///
    /// - Parameters:
    ///   - guests: the guests of this host, for their names.
    ///   - patience: how long a process may have it open that only looks: udev does so after each change, and indexers do.
    public func users(_ guests: GuestStore, patience: Duration) -> ImageUsers {
        let end = ContinuousClock.now + patience
        while true {
            let found = users(guests)
            // A guest does not go by itself, nor does what has mounted an image.
            let isLasting = found.users.isEmpty || !found.claims.isEmpty || found.users.contains { $0.guest != nil }
            if isLasting || ContinuousClock.now >= end { return found }
            usleep(10_000)
        }
    }

    /// Who else has an image open at the moment.
    ///
    /// - Parameter guests: the guests of this host, for their names.
    public func users(_ guests: GuestStore) -> ImageUsers {
        let holders = holder.recorded.map { [$0] } ?? []
        return ImageUsers.find(
            images,
            ignoring: Set(holders.map(\.pid) + (process.map { [$0.pid] } ?? [])),
            areHeld: !holders.isEmpty,
            guests: guests
        )
    }

    // MARK: The fence itself

    /// Takes the images out of reach. When this returns, no name leads to them any more, durably.
    ///
    /// - Throws: `MigrationError` that names the image for which that is not so; then the others have their names again.
    public func raise() throws {
        var open: Set<ImageIdentity>?
        if let process, process.isRunning {
            do { open = try ImageIdentity.open(in: process.pid) } catch {
                throw MigrationError(.failed, "Which images QEMU of guest '\(guest)' has open cannot be seen: \(error)")
            }
        }
        var done: [FencedImage] = []
        do {
            for image in renamed where try rename(image, open) { done.append(image) }
            if !devices.isEmpty { try holder.hold(devices.map(\.path)) }
        } catch {
            var left = ""
            for image in done.reversed() { if let problem = giveBack(image) { left += ". \(problem)" } }
            throw MigrationError((error as? MigrationError)?.code ?? .failed, "\(error)\(left)")
        }
    }

    /// Renames an image, unless that was done before. Returns whether it was done now; after a failure it is not.
    private func rename(_ image: FencedImage, _ open: Set<ImageIdentity>?) throws(MigrationError) -> Bool {
        let name = image.fencedName(migration)
        let directory = xd_open_directory(image.directory)
        guard directory >= 0 else { throw Self.failure("open the directory of \(image.realPath)", errno) }
        defer { close(directory) }
        let earlier = xd_identity(at: directory, name, following: false)
        // Nobody has it open, and it is nowhere: somebody has put it out of reach for good.
        if earlier == nil, open == nil, xd_identity(at: directory, image.name, following: false) == nil { return false }
        if earlier == nil {
            try Self.rename(directory, image.name, name, "rename the image \(image.realPath), which must not be used")
        }
        do {
            guard let found = xd_identity(at: directory, name, following: false), let fenced = ImageIdentity(found),
                image.canBe(fenced), open?.contains(fenced) ?? true
            else {
                throw MigrationError(
                    .failed,
                    "\(image.fencedPath(migration)) is not the image that guest '\(guest)' used: \(image.path) was "
                        + "moved or replaced under it"
                )
            }
            guard earlier != nil || found.links == 1 else {
                throw MigrationError(
                    .failed,
                    "The image \(image.realPath) has got a second name (a hard link); remove that"
                )
            }
            for path in Set([image.path, image.realPath]) where ImageIdentity(of: path) == fenced {
                throw MigrationError(
                    .failed,
                    "The image \(image.fencedPath(migration)) can still be reached as \(path)"
                )
            }
            // What has no such thing as a durable name (EINVAL) is no worse off for it: recovery does it again.
            guard fsync(directory) == 0 || errno == EINVAL else {
                throw Self.failure("make the name \(image.fencedPath(migration)) durable", errno)
            }
        } catch let error as MigrationError {
            if earlier == nil { try Self.rename(directory, name, image.name, "give \(image.realPath) its name back") }
            throw error
        } catch { throw MigrationError(.failed, "\(error)") }
        return earlier == nil
    }

    private static func failure(_ action: String, _ error: Int32) -> MigrationError {
        MigrationError(.failed, "Cannot \(action): \(words(error))")
    }

    /// Renames within a directory, without replacing anything.
    private static func rename(_ directory: Int32, _ old: String, _ new: String, _ action: String)
        throws(MigrationError)
    {
        if xd_rename_no_replace(directory, old, directory, new) == 0 { return }
        // Network file systems cannot promise it.
        guard errno == EINVAL, xd_identity(at: directory, new, following: false) == nil else {
            throw failure(action, errno)
        }
        guard renameat(directory, old, directory, new) == 0 else { throw failure(action, errno) }
    }

    /// Takes the user of its own that the guest had on this host from its devices. For a guest that is the other host's for good: one that
    /// comes back opens them again.
    func withdrawUser() { for device in devices { GuestDevice.withdraw(device.path) } }

    /// Gives the images their names back, and lets devices go.
    ///
    /// - Returns: what could not be done, a sentence each.
    public func lift() -> [String] {
        var problems = devices.isEmpty ? [] : holder.end()
        for image in renamed { if let problem = giveBack(image) { problems.append(problem) } }
        return problems
    }

    private func giveBack(_ image: FencedImage) -> String? {
        let name = image.fencedName(migration)
        let fenced = image.fencedPath(migration)
        let directory = xd_open_directory(image.directory)
        guard directory >= 0 else {
            return "The image \(fenced) cannot get its name back: its directory cannot be opened: \(Self.words(errno))"
        }
        defer { close(directory) }
        guard xd_identity(at: directory, name, following: false) != nil else { return nil }
        guard xd_identity(at: directory, image.name, following: false) == nil else {
            return "The image \(fenced) cannot get its name back: \(image.realPath) is in the way"
        }
        do { try Self.rename(directory, name, image.name, "rename \(fenced) to \(image.realPath)") } catch {
            return error.message
        }
        fsync(directory)
        return nil
    }
}
