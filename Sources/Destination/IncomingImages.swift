internal import CLinux
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
        let file: RawFile
        let digests: ChunkDigests
    }

    private(set) var images: [Image] = []
    private let exports: ExportTable
    private let directory: String
    private let isStopped = Atomic<Bool>(false)

    init(directory: String, exports: ExportTable) {
        self.directory = directory
        self.exports = exports
    }

    /// Makes an empty image and its export.
    ///
    /// - Throws: `ChannelError` that names the file.
    func create(_ disk: Message.Offer.Disk, at path: String, export name: String, for peer: TLSPeerName) throws {
        try DurableFile.makeDirectory(directory)
        let fd = xd_open_create_exclusive(path)
        guard fd >= 0 else { throw ChannelError.system("create the image \(path)", errno) }
        let sized = ftruncate(fd, off_t(disk.size))
        let number = errno
        close(fd)
        do {
            guard sized == 0 else {
                throw ChannelError.system("make the image \(path) \(disk.size) bytes long", number)
            }
            try DurableFile.syncDirectory(of: path)
            let digests = try ChunkDigests(size: disk.size, isBlank: true)
            let file = try RawFile(path: path, readOnly: false, observer: digests)
            try file.lock()
            let export = Export(name: name, summary: "\(disk.name) of an incoming guest", backEnd: file) {
                $0?.name == peer ? .readWrite : .denied("It is of another migration")
            }
            images.append(Image(disk: disk, path: path, export: export, file: file, digests: digests))
            exports.add(export)
        } catch {
            unlink(path)
            throw error
        }
    }

    /// Takes up an image that an earlier agent made: nothing is known about its contents.
    func adopt(_ disk: Message.Offer.Disk, at path: String, export name: String) throws {
        let digests = try ChunkDigests(size: disk.size, isBlank: false)
        let file = try RawFile(path: path, readOnly: false, observer: digests)
        try file.lock()
        let export = Export(name: name, backEnd: file) { _ in .denied("It is of another migration") }
        images.append(Image(disk: disk, path: path, export: export, file: file, digests: digests))
    }

    /// Takes the digests of all chunks that changed since the last time.
    ///
    /// - Parameter isUrgent: whether the guest is paused meanwhile; otherwise others go first.
    func updateDigests(isUrgent: Bool) async throws {
        let pool = isUrgent ? BlockingPool.shared : BlockingPool.background
        for image in images {
            let (digests, path) = (image.digests, image.path)
            _ = try await pool.run {
                try digests.update(from: path) { self.isStopped.load(ordering: .relaxed) }
            }
        }
    }

    /// Lets a pass end early, since its result is no longer wanted. From any thread.
    func stopDigests() { isStopped.store(true, ordering: .relaxed) }

    /// The digests by disk name; right once the exports are closed and the digests updated.
    func digests() async throws -> [String: String] {
        var result: [String: String] = [:]
        for image in images {
            let digests = image.digests
            result[image.disk.name] = try await BlockingPool.shared.run { digests.digest() }
        }
        return result
    }

    /// Ends all writing from the network, for good.
    func closeExports() async {
        for image in images {
            exports.remove(image.export.name)
            await image.export.close()
        }
    }

    /// Makes the images durable.
    func flush() async throws { for image in images { try await image.file.flush() } }

    /// Lets QEMU have the images.
    func unlock() { for image in images { image.file.unlock() } }

    /// Removes the images, when the migration was given up.
    func delete() async {
        await closeExports()
        for image in images { unlink(image.path) }
        images = []
        rmdir(directory)
    }
}

/// The name by which a peer is known: a distinguished name or a user.
typealias TLSPeerName = String
