internal import CLinux
internal import Emulator
internal import FoundationEssentials
internal import Glibc
internal import IO
internal import Migration

extension OutgoingMigration {
    /// Describes the guest to the destination and waits until everything is ready there.
    func offerGuest() async throws {
        guard let monitor, let record else { return }
        let offer = try await describe(monitor, record)
        report.disks = offer.disks.map { .init(name: $0.name, size: $0.size) }
        let (control, welcome) = try await ControlConnection.open(plan, credentials: credentials, on: loop)
        self.control = control
        control.onFailure = { [weak self] in self?.fail($0) }
        guard welcome.state == "new" else {
            throw MigrationError(
                .refused,
                "The destination is in the state '\(welcome.state)' of this migration already"
            )
        }
        try DurableFile.makeDirectory(migrations.directory(of: plan.id))
        let journal = try Journal(creating: migrations.journal(of: plan.id))
        try journal.append(.offered(guest: plan.guest, destination: plan.host, order: migrations.nextOrder()))
        self.journal = journal
        try await control.send(.offer(offer))
        var answer = try await control.next(timeout: .seconds(60))
        if case .need(let wanted) = answer {
            for index in wanted {
                guard offer.files.indices.contains(index) else {
                    throw MigrationError(.failed, "The destination asked for a file that was not offered")
                }
                try await sendFile(offer.files[index], index, record, control)
            }
            answer = try await control.next(timeout: .seconds(120))
        }
        guard case .ready(let ready) = answer else {
            throw MigrationError(.failed, "The destination answered OFFER with \(answer.name)")
        }
        guard ready.reasons.isEmpty else {
            throw MigrationError(
                .refused,
                "The destination \(plan.host) refused guest '\(plan.guest)': \(ready.reasons.joined(separator: "; "))"
            )
        }
        try await connectDisks(ready)
    }

    private func describe(_ monitor: QMPClient, _ record: GuestRecord) async throws -> Message.Offer {
        do {
            let machine = try await monitor.machineType()
            let commandLine = try record.commandLine.pinned(machine: machine)
            let references = try commandLine.paths()
            let attached = try await monitor.disks()
            for disk in attached where !disk.isReadOnly {
                try checkDisk(disk, references, commandLine.directory)
            }
            var offered: [Message.Offer.Disk] = []
            for reference in references where reference.kind == .disk {
                let path = DurableFile.resolve(reference.path, in: commandLine.directory)
                guard let disk = attached.first(where: { Self.isSame($0.path, path, commandLine.directory) }) else {
                    throw GuestError(
                        "The disk \(reference.path) of \(reference.option) is not attached to the running guest"
                    )
                }
                if offered.contains(where: { $0.path == reference.path }) { continue }
                var status = stat()
                // Only a file system knows how much of a disk is in use.
                let isFile = stat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFREG
                let allocated = isFile ? UInt64(status.st_blocks) * 512 : disk.size
                let item = Message.Offer.Disk(
                    name: "disk\(offered.count)",
                    size: disk.size,
                    allocated: min(allocated, disk.size),
                    path: reference.path
                )
                offered.append(item)
                disks.append(SourceDisk(offer: item, node: disk.node, path: path))
            }
            var files: [Message.Offer.File] = []
            for reference in references where reference.kind == .file {
                if reference.path.isEmpty || files.contains(where: { $0.path == reference.path }) { continue }
                let path = DurableFile.resolve(reference.path, in: commandLine.directory)
                var status = stat()
                guard stat(path, &status) == 0, status.st_mode & S_IFMT == S_IFREG else {
                    throw GuestError("The file \(path) of \(reference.option) is not there any more")
                }
                let digest = try await BlockingPool.shared.run { try ChunkDigests.digest(of: path) }
                files.append(.init(path: reference.path, size: UInt64(status.st_size), digest: digest))
            }
            return Message.Offer(
                guest: plan.guest,
                commandLine: commandLine,
                machine: machine,
                emulatorVersion: monitor.version,
                disks: offered,
                files: files,
                hasUUID: commandLine.has("uuid")
            )
        } catch let error as GuestError {
            throw MigrationError(.guest, error.message)
        }
    }

    private static func isSame(_ a: String, _ b: String, _ directory: String) -> Bool {
        DurableFile.resolve(a, in: directory) == b
    }

    private func checkDisk(
        _ disk: GuestDisk,
        _ references: [GuestCommandLine.PathReference],
        _ directory: String
    ) throws {
        let isKnown = references.contains {
            $0.kind == .disk && Self.isSame(disk.path, DurableFile.resolve($0.path, in: directory), directory)
        }
        guard isKnown else {
            throw GuestError("The disk \(disk.path) (\(disk.node)) is not in the guest's command line; detach it first")
        }
        guard disk.format == "raw", !disk.hasBacking else {
            throw GuestError(
                "The disk \(disk.path) has the format '\(disk.format)'; only raw images and block devices can be moved"
            )
        }
    }

    private func sendFile(
        _ file: Message.Offer.File,
        _ index: Int,
        _ record: GuestRecord,
        _ control: ControlConnection
    ) async throws {
        let path = DurableFile.resolve(file.path, in: record.commandLine.directory)
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
