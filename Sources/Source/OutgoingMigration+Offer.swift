internal import CLinux
internal import Emulator
internal import FoundationEssentials
internal import Glibc
internal import IO
internal import Migration
internal import NBD
internal import TLS

extension OutgoingMigration {
    /// Describes the guest to the destination, rehearses its move and waits until everything is ready there.
    func offerGuest() async throws {
        guard let monitor, let record else { return }
        let inspection = try await inspect(monitor, record)
        let offer = try await describe(inspection)
        for disk in inspection.disks where !disk.bitmaps.isEmpty {
            warn(
                "The dirty bitmaps of disk '\(disk.name)' (\(disk.bitmaps.joined(separator: ", "))) do not move; the next backup "
                    + "there has to be a whole one"
            )
        }
        report.disks = offer.disks.map { .init(name: $0.name, size: $0.size) }
        let (control, welcome) = try await ControlConnection.open(plan, credentials: credentials, on: loop)
        self.control = control
        watch(control)
        guard welcome.state == .new else {
            throw MigrationError(
                .refused,
                "The destination is in the state '\(welcome.state.rawValue)' of this migration already"
            )
        }
        let link = try await probe(control)
        if !plan.isRehearsal {
            try DurableFile.makeDirectory(migrations.directory(of: plan.id))
            // An agent that dies with an open journal has somebody who closes it.
            try startWatchdog(monitor)
            let journal = try Journal(creating: migrations.journal(of: plan.id))
            try journal.append(.offered(guest: plan.guest, destination: plan.host, order: migrations.nextOrder()))
            self.journal = journal
            try saveDisks()
        }
        if !plan.isRehearsal { secrets = inspection.secrets }
        try await sendSecrets(control)
        try await control.send(.offer(offer))
        try await rehearse(offer, inspection, link, monitor, control)
        if plan.isRehearsal { return }
        // The destination reads what it has under the same names; a gigabyte a second is slow for SHA-256.
        let known = offer.files.reduce(0) { $0 + $1.size } + offer.disks.flatMap(\.backing).reduce(0) { $0 + $1.size }
        let patience = Duration.seconds(60 + Int(clamping: known >> 26))
        var answer = try await control.next(timeout: patience)
        if case .need(let wanted) = answer {
            for index in wanted {
                guard offer.files.indices.contains(index) else {
                    throw MigrationError(.failed, "The destination asked for a file that was not offered")
                }
                try await sendFile(offer.files[index], index, inspection, control)
            }
            answer = try await control.next(timeout: .seconds(120))
        }
        let ready = try readiness(answer)
        keepsBacking = Set(ready.keepsBacking)
        isResumable = true
        try await connectDisks(ready)
    }

    /// A destination agent keeps them in memory only, so each new one has to be told.
    func sendSecrets(_ control: ControlConnection) async throws {
        if secrets.isEmpty { return }
        try await control.send(.secrets(secrets.mapValues { $0.withBytes { Base64.encode($0) } }))
    }

    /// The destination's word that all is well.
    ///
    /// - Throws: `MigrationError` with every reason why not.
    func readiness(_ answer: Message) throws -> Message.Ready {
        guard case .ready(let ready) = answer else {
            throw MigrationError(.failed, "The destination answered OFFER with \(answer.name)")
        }
        guard ready.reasons.isEmpty else { throw refusal(ready.reasons) }
        return ready
    }

    func refusal(_ reasons: [String]) -> MigrationError {
        let most = 40
        let more = reasons.count > most ? "; and \(reasons.count - most) more" : ""
        let text = reasons.prefix(most).map(Self.said).joined(separator: "; ")
        return MigrationError(.refused, "The destination \(plan.host) refused guest '\(plan.guest)': \(text)\(more)")
    }

    /// What the other side said, as it may be shown: of bounded length, without control characters.
    static func said(_ text: String) -> String {
        let most = 1000
        var shown = String(
            String.UnicodeScalarView(
                text.unicodeScalars.prefix(most).map { scalar in
                    scalar.value < 32 || (127..<160).contains(scalar.value) ? "?" : scalar
                }
            )
        )
        if text.unicodeScalars.count > most { shown += "..." }
        return shown
    }

    private func inspect(_ monitor: QMPClient, _ record: GuestRecord) async throws -> GuestInspection {
        do {
            let inspection = try await GuestInspection.inspect(monitor, record)
            guard inspection.blockers.isEmpty else {
                throw MigrationError(
                    .guest,
                    "Guest '\(plan.guest)' cannot be migrated: \(inspection.blockers.joined(separator: "; "))"
                )
            }
            return inspection
        } catch let error as GuestError {
            throw MigrationError(.guest, error.message)
        } catch let error as QMPError {
            throw MigrationError(.guest, "The monitor of guest '\(plan.guest)': \(error.message)")
        }
    }

    private func describe(_ inspection: GuestInspection) async throws -> Message.Offer {
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
                let item = try offer(disk, reference.path, path, number: offered.count, inspection)
                offered.append(item)
                var source = SourceDisk(offer: item, node: disk.node, path: path)
                source.format = disk.format
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
                files.append(.init(path: item.headerName, size: size, digest: try await headerDigest(path, size)))
                headers[item.headerName] = path
            }
            var offer = Message.Offer(
                guest: plan.guest,
                commandLine: inspection.commandLine,
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
            return offer
        } catch let error as GuestError {
            throw MigrationError(.guest, error.message)
        }
    }

    private func headerDigest(_ path: String, _ size: UInt64) async throws -> String {
        try await dataLoops.next().run {
            var options = RawFile.Options()
            options.isReadOnly = true
            options.length = size
            return try await ChunkDigests.digest(of: RawFile(path: path, options))
        }
    }

    /// Formats that QEMU's tools can make and write.
    private static let writableFormats: Set<String> = ["raw", "qcow2", "qed", "vdi", "vmdk", "vpc", "vhdx", "luks"]

    private func offer(
        _ disk: GuestDisk,
        _ text: String,
        _ path: String,
        number: Int,
        _ inspection: GuestInspection
    ) throws -> Message.Offer.Disk {
        let isContainer = disk.format == "luks"
        let format = plan.format ?? disk.format
        guard !isContainer || plan.format == nil else {
            throw GuestError("The disk \(path) is a LUKS container, which keeps its format; leave --format out")
        }
        guard Self.writableFormats.contains(format) else {
            throw GuestError(
                "The disk \(path) has the format '\(format)', which QEMU cannot write everywhere; choose one with --format"
            )
        }
        let size = disk.size
        var status = stat()
        // Only a file system knows how much of a disk is in use.
        let isFile = stat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFREG
        var allocated = isFile ? UInt64(status.st_blocks) * 512 : disk.allocated ?? size
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

    // MARK: what recovery needs

    private static func disksFile(_ id: String, _ migrations: MigrationStore) -> String {
        migrations.files(of: id).disks
    }

    /// What recovery knows of a disk.
    struct SavedDisk: Codable {
        var path: String
        var format: String
        var size: UInt64
        var isSealed: Bool
        /// Which file it is; earlier versions did not say.
        var image: FencedImage?
    }

    private func saveDisks() throws {
        let saved = disks.map {
            SavedDisk(
                path: $0.path,
                format: $0.format,
                size: $0.offer.size,
                isSealed: $0.secret != nil,
                image: FencedImage($0.path)
            )
        }
        try DurableFile.write(try JSONText.encode(saved), to: Self.disksFile(plan.id, migrations))
    }

    /// The disks of a migration whose agent has died.
    static func savedDisks(of id: String, _ migrations: MigrationStore) -> [SavedDisk] {
        guard let bytes = (try? DurableFile.read(disksFile(id, migrations))) ?? nil else { return [] }
        return JSONText.decode([SavedDisk].self, from: bytes) ?? []
    }

    private func sendFile(
        _ file: Message.Offer.File,
        _ index: Int,
        _ inspection: GuestInspection,
        _ control: ControlConnection
    ) async throws {
        let path = headers[file.path] ?? inspection.resolved[file.path] ?? file.path
        let fd = open(path, O_RDONLY | O_CLOEXEC)
        guard fd >= 0 else { throw ChannelError.system("read \(path)", errno) }
        defer { close(fd) }
        try await control.send(.file(index))
        var rest = Int(file.size)
        while rest > 0 {
            let wanted = min(rest, MessageConnection.maximumData)
            let piece = try await BlockingPool.shared.run {
                var bytes = [UInt8](repeating: 0, count: wanted)
                let count = Glibc.read(fd, &bytes, wanted)
                guard count > 0 else { throw ChannelError.system("read \(path)", count == 0 ? EIO : errno) }
                return Array(bytes[..<count])
            }
            try await control.send(data: piece)
            rest -= piece.count
            if let fault { throw fault }
        }
    }
}
