internal import Emulator
internal import Glibc
internal import IO
internal import Migration
internal import TLS

/// A disk on its way to the destination.
struct SourceDisk {
    /// What the destination was told of it.
    private(set) var offer: Message.Offer.Disk
    /// The node that is mirrored.
    let node: String
    /// The image.
    let path: String
    /// The file with the image's data, where that has only the map of it.
    var dataPath: String?
    /// The image's format, as QEMU knows it.
    var format = "raw"
    /// Whether the image cannot be opened, because its secret died with an agent.
    var isSealed = false
    /// What opens the image; nil when nothing is needed.
    var secret: SecretBytes?
    /// Its lineages, the latest last: this migration's own.
    var lineages: [Lineage] = []
    /// Whether the destination begins with an image of it that it has.
    var isSeeded = false
    /// Whether the destination was told every chunk of it, to compare it before it takes the guest.
    var isProved = false
    /// Where its connections live, once they were begun.
    var loop: EventLoop?
    /// The connections that were begun before its export was known.
    var dialled: [DialledConnection] = []
    /// What carries it, once it is set up.
    var relay: MirrorRelay?
    /// Whether the block job exists.
    var hasJob = false
    /// Whether the node of the relay's socket exists.
    var hasTarget = false
    /// Whether QEMU said that the copy has caught up once.
    var isReady = false
    /// Why its copy waits for the destination; nil while it does not.
    var absence: String?
    /// Bytes a second that its copy may use; 0 for no limit.
    var speed: UInt64 = 0
    /// What the job said last.
    var job: BlockJob?

    /// The same disk with more said of it.
    func offering(_ offer: Message.Offer.Disk) -> SourceDisk {
        var disk = self
        disk.offer = offer
        return disk
    }

    /// How the names of our jobs begin, whatever migration they are of.
    static let jobPrefix = "xd-"
    /// How the names of our nodes begin.
    static let nodePrefix = "xdt-"
    /// The block job's name.
    func jobName(_ migration: String) -> String { "\(Self.jobPrefix)\(offer.name)-\(migration.suffix(6))" }
    /// The name of the node that leads to the relay; at most 31 bytes.
    func targetNode(_ migration: String) -> String { "\(Self.nodePrefix)\(offer.name)-\(migration.suffix(6))" }

    /// How many bytes of the disk are more than a hole, as far as the host knows.
    var allocated: UInt64 {
        var status = stat()
        guard stat(path, &status) == 0, status.st_mode & S_IFMT == S_IFREG else { return offer.size }
        return min(UInt64(status.st_blocks) * 512, offer.size)
    }

    /// Bytes that the destination does not have yet, what the relay holds included.
    var remaining: UInt64 {
        guard let job else { return offer.size }
        return (job.total - min(job.current, job.total)) + (relay?.counters.bytesInFlight ?? 0)
    }
}

extension SourceDisk {
    /// The digest of what the mirror copied, read from the disk's image; nil when it cannot be read.
    ///
    /// - Parameters:
    ///   - path: where the image is now.
    ///   - data: where the file with its data is now, if it has one.
    ///   - loops: where it is read.
    func digest(at path: String, data: String?, on loops: EventLoopGroup) async -> String? {
        try? await DiskImage.digest(
            of: path,
            format: format,
            size: offer.size,
            secret: secret,
            dataFile: data,
            on: loops
        )
    }

    /// The files that the guest leaves.
    var files: [String] { [path] + (dataPath.map { [$0] } ?? []) }
}
