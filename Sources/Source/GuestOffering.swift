internal import CLinux
internal import Emulator
internal import FoundationEssentials
internal import Glibc
internal import IO
internal import Migration
internal import NBD
internal import TLS

/// A guest as it is described to the destination, and where that description leads to on this host.
struct GuestOffering {
    /// What QEMU says of the guest.
    let inspection: GuestInspection
    /// What the destination is told.
    let offer: Message.Offer
    /// The disks that are to be copied.
    let disks: [SourceDisk]
    /// The containers whose headers are sent as files, by the name of the file.
    private let headers: [String: String]

    // MARK: the destination's answer

    /// The destination's word that all is well.
    ///
    /// - Throws: `MigrationError` with every reason why not.
    static func readiness(_ answer: Message, _ plan: MigrationPlan) throws -> Message.Ready {
        guard case .ready(let ready) = answer else {
            throw MigrationError(.failed, "The destination answered OFFER with \(answer.name)")
        }
        guard ready.reasons.isEmpty else { throw refusal(Obstacle.paired(ready.reasons, ready.checks), plan) }
        return ready
    }

    static func refusal(_ obstacles: [Obstacle], _ plan: MigrationPlan) -> MigrationError {
        let most = 40
        let more = obstacles.count > most ? "; and \(obstacles.count - most) more" : ""
        let told = obstacles.prefix(most).map { Obstacle($0.check, MigrationContext.said($0.reason)) }
        let text = told.map(\.reason).joined(separator: "; ")
        return MigrationError(
            .refused,
            "The destination \(plan.host) refused guest '\(plan.guest)': \(text)\(more)",
            obstacles: told
        )
    }

    // MARK: the description

    /// Asks QEMU what the guest is.
    ///
    /// - Throws: `MigrationError` with what keeps it from moving.
    static func inspect(
        _ monitor: QMPClient,
        _ record: GuestRecord,
        _ plan: MigrationPlan
    ) async throws -> GuestInspection {
        do {
            let inspection = try await GuestInspection.inspect(monitor, record)
            guard inspection.blockers.isEmpty else {
                throw MigrationError(
                    .guest,
                    "Guest '\(plan.guest)' cannot be migrated: \(inspection.blockers.joined(separator: "; "))",
                    obstacles: inspection.blockers.map {
                        Obstacle(inspection.immovable.contains($0) ? .devices : .blockers, $0)
                    }
                )
            }
            return inspection
        } catch let error as GuestError {
            throw MigrationError(.guest, error.message)
        } catch let error as QMPError {
            throw MigrationError(.guest, "The monitor of guest '\(plan.guest)': \(error.message)")
        }
    }

    /// Describes a guest.
    ///
    /// - Parameters:
    ///   - inspection: what QEMU says of it.
    ///   - plan: what to do with it.
    ///   - record: what this host knows of it.
    ///   - loops: where digests are taken.
    /// - Throws: `MigrationError` naming what cannot be described.
    init(
        _ inspection: GuestInspection,
        _ plan: MigrationPlan,
        _ record: GuestRecord,
        on loops: EventLoopGroup
    ) async throws {
        self.inspection = inspection
        var disks: [SourceDisk] = []
        var headers: [String: String] = [:]
        do {
            let references = try inspection.commandLine.paths()
            var offered: [Message.Offer.Disk] = []
            for reference in references where reference.kind == .disk {
                if offered.contains(where: { $0.path == reference.path }) { continue }
                guard let disk = inspection.diskOfPath[reference.path],
                    let path = inspection.resolved[reference.path]
                else {
                    throw GuestError("The disk \(reference.path) of \(reference.option) is not attached to the guest")
                }
                let item = try Self.describe(disk, reference.path, path, number: offered.count, inspection, plan)
                offered.append(item)
                var source = SourceDisk(offer: item, node: disk.node, path: path)
                source.format = disk.format
                source.dataPath = disk.dataFile.map { DurableFile.resolve($0, in: record.commandLine.directory) }
                source.secret = item.keySecret.flatMap { inspection.secrets[$0] }
                disks.append(source)
            }
            var files: [Message.Offer.File] = []
            for reference in references where reference.kind == .file {
                if reference.path.isEmpty || files.contains(where: { $0.path == reference.path }) { continue }
                let path = inspection.resolved[reference.path] ?? reference.path
                var status = stat()
                guard stat(path, &status) == 0, status.st_mode & S_IFMT == S_IFREG else {
                    throw GuestError("The file \(path) of \(reference.option) is not there any more")
                }
                if let disk = inspection.disks.first(where: { $0.path == path }),
                    !disk.backing.isEmpty
                {
                    throw GuestError("The read-only disk \(path) has a backing file, which cannot be sent with it")
                }
                let digest = try await BlockingPool.shared.run { try ChunkDigests.digest(of: path) }
                files.append(.init(path: reference.path, size: UInt64(status.st_size), digest: digest))
            }
            for item in offered where item.isContainer {
                // QEMU opens a container when it starts, and wants to find the keys.
                guard let path = inspection.resolved[item.path],
                    let size = inspection.diskOfPath[item.path]?.headerSize
                else {
                    throw GuestError("The disk \(item.path) is a LUKS container whose header QEMU does not describe")
                }
                files.append(
                    .init(path: item.headerName, size: size, digest: try await Self.headerDigest(path, size, on: loops))
                )
                headers[item.headerName] = path
            }
            try Self.nameSeeds(&offered, plan)
            let networks = try GuestNetworks(inspection, plan, record)
            for index in offered.indices { disks[index] = disks[index].offering(offered[index]) }
            var offer = Message.Offer(
                guest: plan.guest,
                commandLine: networks.commandLine,
                machine: inspection.machine,
                emulatorVersion: inspection.emulatorVersion,
                disks: offered,
                files: files,
                hasUUID: inspection.commandLine.has("uuid")
            )
            offer.isRehearsal = plan.isRehearsal
            offer.sizes = inspection.sizes
            offer.memory = inspection.memory
            offer.memoryID = inspection.memoryID
            offer.hasFixedProcessor = inspection.isProcessorFixed
            offer.standards = inspection.standards
            offer.reservation = plan.reservation
            offer.placement = record.placement
            offer.networks = networks.offered
            offer.home = record.origin
            self.offer = offer
        } catch let error as GuestError {
            throw MigrationError(.guest, error.message, obstacles: [Obstacle(.files, error.message)])
        }
        self.disks = disks
        self.headers = headers
    }

    /// Names the images of the destination with which disks are begun, as the operator said.
    private static func nameSeeds(_ disks: inout [Message.Offer.Disk], _ plan: MigrationPlan) throws {
        for (name, seed) in plan.seeds ?? [:] {
            guard let index = name.isEmpty && disks.count == 1 ? 0 : disks.firstIndex(where: { $0.name == name }) else {
                let names = disks.map(\.name).joined(separator: ", ")
                throw GuestError(
                    name.isEmpty
                        ? "Which disk '\(seed)' is for has to be said: --seed DISK=NAME with one of \(names)"
                        : "There is no disk '\(name)' for --seed; the guest has \(names)"
                )
            }
            guard disks[index].format == "raw", disks[index].keySecret == nil, !disks[index].isContainer else {
                throw GuestError("\(disks[index].name) is no raw image in clear at the destination, which --seed needs")
            }
            disks[index].seed = seed
        }
    }

    private static func headerDigest(
        _ path: String,
        _ size: UInt64,
        on loops: EventLoopGroup
    ) async throws -> String {
        try await loops.next().run {
            var options = RawFile.Options()
            options.isReadOnly = true
            options.length = size
            return try await ChunkDigests.digest(of: RawFile(path: path, options))
        }
    }

    private static func describe(
        _ disk: GuestDisk,
        _ text: String,
        _ path: String,
        number: Int,
        _ inspection: GuestInspection,
        _ plan: MigrationPlan
    ) throws -> Message.Offer.Disk {
        let isContainer = disk.format == "luks"
        let format = plan.format ?? disk.format
        guard !isContainer || plan.format == nil else {
            throw GuestError("The disk \(path) is a LUKS container, which keeps its format; leave --format out")
        }
        guard ImageFormat.isCarried(format) else {
            throw GuestError(
                "The disk \(path) has the format '\(format)', in which no destination makes images; choose one with --format"
            )
        }
        let size = disk.size
        var status = stat()
        // Only a file system knows how much of a disk is in use.
        let isFile = stat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFREG
        var allocated = isFile ? UInt64(status.st_blocks) * 512 : disk.allocated ?? size
        if let data = disk.dataFile {
            let isFile = stat(data, &status) == 0 && status.st_mode & S_IFMT == S_IFREG
            allocated += isFile ? UInt64(status.st_blocks) * 512 : size
        }
        for image in disk.backing { allocated += image.allocated ?? image.size }
        var item = Message.Offer.Disk(
            name: "disk\(number)",
            size: size,
            allocated: min(allocated, size),
            path: text,
            format: format
        )
        item.sourceFormat = disk.format
        // The header goes first, with all its key slots, so that both containers have the same keys.
        item.containerSize = isContainer ? disk.fileSize : nil
        // Encrypted zeroes are data.
        if disk.isEncrypted { item.allocated = size }
        if disk.isEncrypted {
            guard plan.format == nil || plan.format == disk.format else {
                throw GuestError("The disk \(path) is encrypted and would be stored in clear; leave --format out")
            }
            guard let secret = inspection.keySecret[text] else {
                throw GuestError("The disk \(path) is encrypted, and the command line does not name its secret")
            }
            item.keySecret = secret
        }
        if format == "qcow2", item.keySecret == nil, disk.backing.allSatisfy({ $0.protocolDriver == "file" }) {
            item.backing = disk.backing.map { .init(path: $0.path, size: 0, digest: "") }
            for index in item.backing.indices {
                guard stat(item.backing[index].path, &status) == 0, item.backing[index].path.hasPrefix("/") else {
                    item.backing = []
                    break
                }
                item.backing[index].size = UInt64(status.st_size)
            }
            item.backingFormat = disk.backing.first?.format
        }
        return item
    }

    // MARK: files

    /// Sends a file that the guest reads.
    ///
    /// - Parameter check: throws the reason to stop, if there is one.
    func send(_ index: Int, over control: ControlConnection, check: () throws -> Void) async throws {
        guard offer.files.indices.contains(index) else {
            throw MigrationError(.failed, "The destination asked for a file that was not offered")
        }
        let file = offer.files[index]
        let path = headers[file.path] ?? inspection.resolved[file.path] ?? file.path
        let fd = open(path, O_RDONLY | O_CLOEXEC)
        guard fd >= 0 else { throw FileError.system("read \(path)", errno) }
        defer { close(fd) }
        try await control.send(.file(index))
        var rest = Int(file.size)
        while rest > 0 {
            let wanted = min(rest, MessageConnection.maximumData)
            let piece = try await BlockingPool.shared.run {
                var bytes = [UInt8](repeating: 0, count: wanted)
                let count = Glibc.read(fd, &bytes, wanted)
                guard count > 0 else { throw FileError.system("read \(path)", count == 0 ? EIO : errno) }
                return Array(bytes[..<count])
            }
            try await control.send(data: piece)
            rest -= piece.count
            try check()
        }
    }
}
