internal import CLinux
internal import Emulator
internal import Glibc
internal import IO
internal import Migration
internal import NBD
internal import Synchronization
internal import TLS

/// The images of one incoming guest: made, exported, watched and closed together.
final class IncomingImages: @unchecked Sendable {
    // Unchecked: confined to the control loop; the digests have their own lock.
    struct Image {
        let disk: Message.Offer.Disk
        let path: String
        let export: Export
        let isDevice: Bool
        /// The image, open; nil for one that an earlier agent made in another format than raw.
        let open: DiskImage?
        let digests: ChunkDigests
        /// Set for one that had contents when the migration began.
        var seed: SeedServing?
        /// Which file it is.
        let identity: ImageIdentity?

        init(
            disk: Message.Offer.Disk,
            path: String,
            export: Export,
            isDevice: Bool,
            open: DiskImage?,
            digests: ChunkDigests,
            seed: SeedServing? = nil
        ) {
            self.disk = disk
            self.path = path
            self.export = export
            self.isDevice = isDevice
            self.open = open
            self.digests = digests
            self.seed = seed
            identity = ImageIdentity(of: path)
        }

        var file: RawFile? { open?.contents as? RawFile }
    }

    /// The images that are not under their names any more, by their paths. QEMU opens them by these names when it goes on.
    func displaced() -> [String] {
        images.filter { $0.identity == nil || ImageIdentity(of: $0.path) != $0.identity }.map(\.path)
    }

    private(set) var images: [Image] = []
    private let exports: ExportTable
    private let directory: String
    private let loops: EventLoopGroup
    private let isStopped = Atomic<Bool>(false)
    private let isPassUnwanted = Atomic<Bool>(false)
    /// Changes with every agent: what an earlier one acknowledged and did not make durable may be gone.
    private let generation: String
    /// How the programs are confined that make and open images.
    private let policy: ConfinementPolicy
    let log: Log
    /// The old images among them, by the disk's name.
    var oldImages: [String: PlacedImage] = [:]
    /// Whether what was there already was compared with what was told of it.
    var areSeedsCompared = false
    /// The passes that compare them, by the image's path.
    var comparisons: [String: ChunkDigests.Pass] = [:]
    /// How many bytes are still to be read back.
    var staleBytes: UInt64 {
        images.reduce(0) { sum, image in
            let isCompared = image.seed == nil || areSeedsCompared
            let rest =
                isCompared
                ? 0
                : comparisons[image.path]?.rest(of: image.digests)
                    ?? ChunkDigests.Pass(.comparison).rest(of: image.digests)
            return sum + image.digests.staleBytes + rest
        }
    }

    init(
        directory: String,
        generation: String,
        exports: ExportTable,
        loops: EventLoopGroup,
        policy: ConfinementPolicy,
        log: Log
    ) {
        self.log = log
        self.policy = policy
        self.directory = directory
        self.generation = generation
        self.exports = exports
        self.loops = loops
    }

    /// Makes an empty image and its export. A block device that is there under the image's name is used as it is.
    ///
    /// - Parameters:
    ///   - disk: what is offered.
    ///   - path: the image.
    ///   - name: the export.
    ///   - backing: the image under it that is kept; nil for an image of its own.
    ///   - secret: what encrypts it.
    ///   - header: a file with the beginning of an encrypted container.
    ///   - peer: who may write to it.
    /// - Throws: `FileError` or `GuestError` that names the file.
    func create(
        _ disk: Message.Offer.Disk,
        at path: String,
        export name: String,
        backing: String?,
        secret: SecretBytes?,
        header: String?,
        for peer: TLSPeerName
    ) async throws {
        try await makeDirectory()
        let isDevice = Self.deviceSize(path) != nil
        guard isDevice || !DurableFile.exists(path) else {
            throw FileError.system("create the image \(path)", EEXIST)
        }
        do {
            if !isDevice { try await Self.make(disk, path, backing, secret, header, policy) }
            var image = StorageDaemon.Image(path: path, format: disk.format)
            image.secret = secret
            image.policy = policy
            if backing != nil { image.backing = disk.backing.map(\.path) }
            let digests = try ChunkDigests(size: disk.size, isBlank: !isDevice && backing == nil)
            let open: DiskImage
            let served: any BackEnd
            if disk.format == "raw" {
                let file = try Self.openRaw(disk, path, isDevice, digests)
                open = DiskImage(file)
                served = file
            } else {
                open = try await DiskImage.open(image, on: loops)
                guard open.contents.size == disk.size else {
                    await open.close()
                    throw GuestError(
                        "An image in the format '\(disk.format)' cannot have exactly \(disk.size) bytes; choose another --format"
                    )
                }
                served = ObservedBackEnd(open.contents, observer: digests)
            }
            add(disk, path, name, served, isDevice, open, digests, peer)
        } catch {
            if !isDevice { unlink(path) }
            throw error
        }
    }

    func makeDirectory() async throws {
        let directory = directory
        try await BlockingPool.shared.run { try DurableFile.makeDirectory(directory) }
        var status = stat()
        guard lstat(directory, &status) == 0, status.st_mode & S_IFMT == S_IFDIR else {
            throw GuestError("\(directory) is no directory of its own; a link would lead the images elsewhere")
        }
    }

    /// A raw image, locked. A device may be larger than the disk.
    static func openRaw(
        _ disk: Message.Offer.Disk,
        _ path: String,
        _ isDevice: Bool,
        _ digests: ChunkDigests
    ) throws -> RawFile {
        var options = RawFile.Options()
        options.observer = digests
        if isDevice { options.length = disk.size }
        let file = try RawFile(path: path, options)
        try file.lock()
        return file
    }

    func add(
        _ disk: Message.Offer.Disk,
        _ path: String,
        _ name: String,
        _ served: any BackEnd,
        _ isDevice: Bool,
        _ open: DiskImage,
        _ digests: ChunkDigests,
        _ peer: TLSPeerName,
        seed: SeedServing? = nil
    ) {
        let summary = "\(disk.name) of an incoming guest, generation \(generation)"
        let export = Export(name: name, summary: summary, backEnd: served, takesCompressed: true) {
            $0?.name == peer ? .readWrite : .denied("It is of another migration")
        }
        images.append(
            Image(
                disk: disk,
                path: path,
                export: export,
                isDevice: isDevice,
                open: open,
                digests: digests,
                seed: seed
            )
        )
        exports.addFenced(export)
    }

    /// Goes on with an image that an earlier agent made and was still filling.
    ///
    /// - Parameters:
    ///   - disk: what was offered.
    ///   - path: the image.
    ///   - name: the export.
    ///   - kept: the images under the guest's disks; nil when that is not known.
    ///   - peer: who may write to it.
    /// - Throws: `FileError` or `GuestError` that names the file.
    func reopen(
        _ disk: Message.Offer.Disk,
        at path: String,
        export name: String,
        keeping kept: [String]?,
        for peer: TLSPeerName
    ) async throws {
        guard disk.keySecret == nil else {
            throw GuestError("The secret of the image \(path) ended with the agent that knew it")
        }
        let digests = try ChunkDigests(size: disk.size, isBlank: false)
        let isDevice = Self.deviceSize(path) != nil
        if disk.format == "raw" {
            let file = try Self.openRaw(disk, path, isDevice, digests)
            add(disk, path, name, file, isDevice, DiskImage(file), digests, peer)
        } else {
            var image = StorageDaemon.Image(path: path, format: disk.format)
            if let kept {
                image.policy = policy
                image.backing = disk.backing.map(\.path).filter(kept.contains)
            }
            // The daemon of the earlier agent ends with it, but not at the same moment.
            var attempts = 0
            while true {
                do {
                    let open = try await DiskImage.open(image, on: loops)
                    let served = ObservedBackEnd(open.contents, observer: digests)
                    return add(disk, path, name, served, isDevice, open, digests, peer)
                } catch let error as GuestError {
                    attempts += 1
                    if attempts > 20 { throw error }
                    _ = await BlockingPool.shared.value { usleep(250_000) }
                }
            }
        }
    }

    /// The bytes of a block device; nil when the path leads to none.
    static func deviceSize(_ path: String) -> UInt64? {
        guard let device = GuestDevice.path(of: path) else { return nil }
        let fd = Glibc.open(device, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
        guard fd >= 0 else { return nil }
        defer { close(fd) }
        var size: UInt64 = 0
        return xd_is_block_device(fd) != 0 && xd_block_device_size(fd, &size) == 0 ? size : nil
    }

    private static func make(
        _ disk: Message.Offer.Disk,
        _ path: String,
        _ backing: String?,
        _ secret: SecretBytes?,
        _ header: String?,
        _ policy: ConfinementPolicy
    ) async throws {
        if disk.format == "raw" || disk.isContainer {
            let fd = xd_open_create_exclusive(path)
            guard fd >= 0 else { throw FileError.system("create the image \(path)", errno) }
            defer { close(fd) }
            if disk.isContainer {
                let bytes = try await BlockingPool.shared.run { try header.flatMap { try DurableFile.read($0) } ?? [] }
                guard bytes.starts(with: Array("LUKS".utf8) + [0xba, 0xbe]) else {
                    unlink(path)
                    throw GuestError("The header of the encrypted disk \(disk.name) did not come, or is none")
                }
                try DurableFile.append(bytes, to: fd, path: path)
            }
            let sized = ftruncate(fd, off_t(disk.containerSize ?? disk.size))
            let number = errno
            guard sized == 0 else {
                unlink(path)
                throw FileError.system("make the image \(path) \(disk.size) bytes long", number)
            }
        } else {
            var options: [String] = []
            if secret != nil { options += ["encrypt.format=luks", "encrypt.key-secret=key"] }
            if let backing { options += ["backing_file=\(backing)", "backing_fmt=\(disk.backingFormat ?? "raw")"] }
            // The name is taken first, so that nothing that is there already is overwritten.
            let fd = xd_open_create_exclusive(path)
            guard fd >= 0 else { throw FileError.system("create the image \(path)", errno) }
            close(fd)
            try await ImageMaker.make(
                path,
                format: disk.format,
                size: disk.size,
                options: options,
                secret: secret,
                policy: policy
            )
            chmod(path, 0o600)
        }
        try await BlockingPool.shared.run { try DurableFile.syncDirectory(of: path) }
    }

    /// Takes up an image that an earlier agent made: nothing is known about its contents.
    func adopt(_ disk: Message.Offer.Disk, at path: String, export name: String) throws {
        let digests = try ChunkDigests(size: disk.size, isBlank: false)
        let isDevice = Self.deviceSize(path) != nil
        var open: DiskImage?
        if disk.format == "raw" { open = DiskImage(try Self.openRaw(disk, path, isDevice, digests)) }
        let export = Export(name: name, backEnd: open?.contents ?? NullDisk(size: disk.size)) { _ in
            .denied("It is of another migration")
        }
        images.append(Image(disk: disk, path: path, export: export, isDevice: isDevice, open: open, digests: digests))
    }

    /// When digests are taken.
    enum Occasion {
        /// While the mirror copies: of what seems to be settled, with what the processors have to spare.
        case copying
        /// While the guest runs.
        case running
        /// While the guest is paused.
        case paused

        var pool: BlockingPool {
            switch self {
            case .copying: .idle
            case .running: .background
            case .paused: .shared
            }
        }
        var workers: Int {
            switch self {
            case .copying: 1
            case .running: 2
            case .paused: 4
            }
        }
    }

    /// Takes the digests of all chunks that changed since the last time. One call at a time.
    func updateDigests(_ occasion: Occasion) async throws {
        for image in images {
            let (digests, path) = (image.digests, image.path)
            // The source waits for the table, which reads the same.
            if occasion == .copying, image.seed?.isDue == true { continue }
            if image.file != nil {
                try await read(digests, path, occasion, .init(occasion == .copying ? .settled : .marked))
            } else if let contents = image.open?.contents, occasion != .copying {
                try await loops.next().run {
                    try await digests.update(from: contents) { self.mustStop }
                }
            }
            if mustStop { return }
            if occasion != .paused { _ = await occasion.pool.value { Self.dropCache(path) } }
        }
    }

    /// Has several threads share one pass over an image.
    func read(
        _ digests: ChunkDigests,
        _ path: String,
        _ occasion: Occasion,
        _ pass: ChunkDigests.Pass
    ) async throws {
        try await withThrowingDiscardingTaskGroup { group in
            for _ in 0..<occasion.workers {
                group.addTask {
                    // Others want the threads too, and theirs may be a guest that is paused.
                    while !pass.isOver(digests), !self.mustStop {
                        _ = try await occasion.pool.run {
                            try digests.update(from: path, in: pass, limit: 1024) { self.mustStop }
                        }
                    }
                }
            }
        }
    }

    /// Empties the page cache of an image. QEMU does so when the guest is resumed, which takes 50 ms for each GiB that is
    /// cached: the guest would wait for that.
    static func dropCache(_ path: String) {
        let fd = Glibc.open(path, O_RDONLY | O_CLOEXEC)
        guard fd >= 0 else { return }
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED)
        close(fd)
    }

    var mustStop: Bool { isStopped.load(ordering: .relaxed) || isPassUnwanted.load(ordering: .relaxed) }

    /// Lets every pass end early from now on, since their results are no longer wanted. From any thread.
    func stopDigests() { isStopped.store(true, ordering: .relaxed) }

    /// Lets the pass that is under way end early; with false the next one goes to its end again.
    func interruptPass(_ mustEnd: Bool) { isPassUnwanted.store(mustEnd, ordering: .relaxed) }

    /// Whether something was written since it was read.
    var isStale: Bool { images.contains { $0.digests.isStale } }

    /// Has everything read once more.
    func markAll() { for image in images { image.digests.markAll() } }

    /// Compares what was read with what the source says. Right once the digests are updated.
    ///
    /// - Returns: the disks that differ.
    func mismatches(_ proofs: [String: DiskProof]) async -> [String] {
        var found: [String] = []
        for image in images {
            // An image that an earlier agent made in another format than raw is not open here, so nothing is known of it.
            guard image.open != nil, let proof = proofs[image.disk.name] else { continue }
            let digests = image.digests
            if await !BlockingPool.shared.value({ digests.matches(proof) }) { found.append(image.disk.name) }
        }
        return found
    }

    /// The digests by disk name; right once the exports are closed and the digests updated.
    func digests() async throws -> [String: String] {
        var result: [String: String] = [:]
        for image in images where image.open != nil {
            let digests = image.digests
            result[image.disk.name] = try await BlockingPool.shared.run { digests.digest() }
        }
        return result
    }

    /// Ends all writing from the network, for good.
    func closeExports() async {
        for image in images {
            await exports.closeFenced(image.export.name)
            await image.export.close()
        }
    }

    /// Makes the images durable.
    func flush() async throws {
        for image in images {
            guard let contents = image.open?.contents else { continue }
            try await loops.next().run { try await contents.flush() }
        }
    }

    /// Lets QEMU have the images.
    func release() async {
        for image in images {
            if let file = image.file { file.unlock() } else { await image.open?.close() }
        }
    }

    /// Ends the exports without touching the images.
    func forget() async {
        await closeExports()
        for image in images {
            await image.seed?.stop()
            await image.open?.close()
        }
        images = []
    }

    /// Removes the images, when the migration was given up.
    func delete() async {
        await closeExports()
        for image in images {
            if image.file == nil { await image.open?.close() }
            await image.seed?.stop()
            if !image.isDevice, oldImages[image.disk.name] == nil { unlink(image.path) }
        }
        await giveOldImagesBack()
        images = []
        rmdir(directory)
    }
}

/// The name by which a peer is known: a distinguished name or a user.
typealias TLSPeerName = String
