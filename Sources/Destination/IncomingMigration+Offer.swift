internal import CLinux
internal import Emulator
internal import Glibc
internal import IO
internal import Migration
internal import TLS

extension IncomingMigration {
    func exportName(_ disk: Message.Offer.Disk) -> String { "\(id)/\(disk.name)" }
    func imageDirectory(_ offer: Message.Offer) -> String {
        "\(agent.configuration.imageDirectory)/\(offer.guest)"
    }

    /// Whether an offer is one that can be judged at all.
    func judgeForm(of offer: Message.Offer) throws {
        try GuestStore.validate(offer.guest)
        let names = Set(offer.disks.map(\.name))
        guard !offer.commandLine.arguments.isEmpty, offer.commandLine.arguments.count < 4096, offer.disks.count <= 64,
            names.count == offer.disks.count, names.allSatisfy(MigrationStore.isID),
            offer.disks.allSatisfy(Self.isPlausible), offer.disks.reduce(0, { $0 + $1.size }) <= 1 << 50,
            offer.sizes.count < 4096, offer.sizes.values.allSatisfy({ $0 <= 1 << 50 }), offer.memory <= 1 << 46,
            Set(offer.files.map(\.path)).count == offer.files.count,
            offer.files.allSatisfy({ $0.digest.utf8.count == 64 && $0.digest.allSatisfy(\.isHexDigit) }),
            offer.files.allSatisfy({ !$0.path.hasPrefix("header:") || $0.size <= 64 << 20 })
        else { throw GuestError("The offer is malformed") }
    }

    /// Whether another migration of a guest of this name is undecided here. Called with the guest's lock, before anything is written.
    ///
    /// What was released from here and not confirmed may be the guest that is offered, if its new host offers it; but the journal
    /// has a host's address and the offer an identity, and neither proves the other. `recover` proves it.
    func checkJournals(of guest: String) throws {
        switch try agent.migrations.startBar(of: guest) {
        case .released(let migration, let destination, isConfirmed: false):
            throw GuestError(
                "A guest '\(guest)' was released from this host to \(destination), which has not confirmed it; run "
                    + "'crossdock recover \(migration)' here first"
            )
        case .arriving(let migration, let source):
            throw GuestError(
                "A guest '\(guest)' is arriving here from \(source) by migration \(migration), which is not decided yet"
            )
        case .released, .overruled, nil: return
        }
    }

    /// What a disk of an offer may be. Its format decides which program opens the image, so only known ones count.
    private static func isPlausible(_ disk: Message.Offer.Disk) -> Bool {
        let formats: Set<String> = ["raw", "qcow2", "qed", "luks"]
        guard disk.size > 0, disk.size <= 1 << 50, disk.allocated <= disk.size, formats.contains(disk.format),
            disk.backing.count <= 256, disk.backing.allSatisfy({ $0.path.hasPrefix("/") && $0.size <= 1 << 50 }),
            disk.backing.isEmpty || formats.contains(disk.backingFormat ?? "")
        else { return false }
        // A header makes an image what it is; only a sealed container may come with one.
        guard let container = disk.containerSize else { return disk.format != "luks" }
        return disk.format == "luks" && disk.keySecret != nil && container >= disk.size
            && container <= disk.size + (1 << 30)
    }

    /// Everything that can be known before anything is made.
    func check(_ offer: Message.Offer) async -> [String] {
        var reasons: [String] = []
        do {
            if let known = try agent.guests.load(offer.guest) {
                previous = known
                if known.process?.isRunning == true {
                    reasons.append("A guest '\(offer.guest)' runs on this host already")
                } else if known.released == nil {
                    reasons.append("A guest '\(offer.guest)' is defined on this host already")
                }
            }
        } catch { reasons.append("\(error)") }
        let program = offer.commandLine.arguments[0]
        if let found = localProgram(program) {
            do {
                if try await !facts(offer).machines.contains(offer.machine) {
                    reasons.append("\(found) on this host does not know the machine type '\(offer.machine)'")
                }
            } catch { reasons.append("\(error)") }
        } else {
            reasons.append("The QEMU program '\(program)' is not installed on this host")
        }
        let directory = agent.configuration.imageDirectory
        if access(directory, W_OK) != 0 {
            reasons.append("Cannot write the image directory \(directory): \(String(cString: strerror(errno)))")
        } else {
            let needed = offer.disks.filter { IncomingImages.deviceSize(imagePath($0, offer)) == nil }
                .reduce(0) { $0 + $1.allocated }
            let free = xd_free_bytes(directory)
            // Below this a file system is full for all practical purposes.
            if free < needed + (1 << 20) {
                reasons.append(
                    "The image directory \(directory) has \(free) bytes free, the disks need at least \(needed)"
                )
            }
        }
        var names: Set<String> = []
        for disk in offer.disks {
            let path = imagePath(disk, offer)
            if !names.insert(path).inserted { reasons.append("Two disks would both become \(path)") }
            if let size = IncomingImages.deviceSize(path) {
                if disk.format != "raw" {
                    reasons.append("The image \(path) is a block device, which can only be raw; use --format raw")
                } else if size < disk.size {
                    reasons.append("The block device \(path) has \(size) bytes, the disk needs \(disk.size)")
                } else if !DeviceHolder.isHeld(path, for: offer.guest, agent.migrations),
                    let holder = Self.deviceHolder(path)
                {
                    reasons.append("The block device \(path) cannot be used: \(holder)")
                }
            } else if DurableFile.exists(path) {
                reasons.append("The image \(path) exists already")
            }
        }
        return reasons
    }

    /// Why a block device is not free; nil when it is.
    private static func deviceHolder(_ path: String) -> String? {
        let fd = Glibc.open(path, O_RDWR | O_EXCL | O_CLOEXEC)
        if fd < 0 { return String(cString: strerror(errno)) }
        close(fd)
        return nil
    }

    /// The program of the offer by its path, or by its name in PATH. The name must be one of QEMU's: the offer says
    /// which machine to start, not which program of this host to run.
    func localProgram(_ program: String) -> String? {
        let name = Self.lastComponent(program)
        guard name.hasPrefix("qemu-system-") || ["qemu-kvm", "kvm"].contains(name) else { return nil }
        return (program.hasPrefix("/") ? EmulatorProcess.find(program) : nil) ?? EmulatorProcess.find(name)
    }

    /// What the QEMU that the guest will have here can do.
    func facts(_ offer: Message.Offer) async throws -> EmulatorFacts {
        guard let program = localProgram(offer.commandLine.program) else {
            throw GuestError("The QEMU program '\(offer.commandLine.program)' is not installed on this host")
        }
        // It gets nothing of the source's but names, and no user of its own: it is asked once for many guests.
        let policy = agent.configuration.confinement
        let facts = try await EmulatorFacts.of(program, for: offer.commandLine, policy: policy, on: agent.loop)
        guard facts.hasSystemCallFilter || policy.strictness != .required else {
            throw GuestError(
                "\(program) was built without a filter of system calls (seccomp), which --require-confinement asks for"
            )
        }
        return facts
    }

    private static func lastComponent(_ path: String) -> String {
        let name = path.split(separator: "/").last.map(String.init) ?? ""
        return name.isEmpty || name == "." || name == ".." ? "unnamed" : name
    }

    /// The image keeps the name that it has on the source; its directory is the guest's own.
    func imagePath(_ disk: Message.Offer.Disk, _ offer: Message.Offer) -> String {
        "\(imageDirectory(offer))/\(Self.lastComponent(disk.path))"
    }

    /// Where each file of the offer is on this host; what is not here is asked for.
    func findFiles(_ offer: Message.Offer, _ connection: MessageConnection) async throws -> [String: String] {
        let store = "\(agent.configuration.imageDirectory)/.files"
        var found: [String: String] = [:]
        var missing: [Int] = []
        var asked: Set<String> = []
        for (index, file) in offer.files.enumerated() {
            guard file.digest.utf8.count == 64, file.digest.allSatisfy(\.isHexDigit) else {
                throw GuestError("The offer is malformed")
            }
            let stored = "\(store)/\(file.digest)"
            let candidates = file.path.hasPrefix("/") ? [stored, file.path] : [stored]
            for candidate in candidates where found[file.path] == nil {
                let isReadable = candidate == stored || policy?.canRead(candidate) ?? true
                if isReadable, await Self.matches(candidate, file) { found[file.path] = candidate }
            }
            if found[file.path] == nil {
                // Two paths may lead to the same contents.
                if asked.insert(file.digest).inserted { missing.append(index) }
                found[file.path] = stored
            }
        }
        if missing.isEmpty { return found }
        if conversation.isEmpty { throw ChannelError(.closed, "The connection to the source was lost") }
        try DurableFile.makeDirectory(store)
        let receiver = FileReceiver(offer.files, missing, store: store, migration: id)
        self.receiver = receiver
        defer { self.receiver = nil }
        try await connection.send(.need(missing))
        while !receiver.isComplete {
            let timer = agent.loop.schedule(after: .seconds(60)) {
                receiver.abandon(ChannelError(.timedOut, "The source sent nothing of the guest's files for 60 s"))
            }
            await receiver.progress.wait()
            timer.cancel()
            if let failure = receiver.failure { throw failure }
        }
        for index in missing {
            let file = offer.files[index]
            let temporary = receiver.path(index)
            guard await Self.matches(temporary, file) else {
                unlink(temporary)
                throw GuestError("The file \(file.path) arrived damaged")
            }
            guard rename(temporary, "\(store)/\(file.digest)") == 0 else {
                throw FileError.system("rename \(temporary)", errno)
            }
        }
        return found
    }

    static func matches(_ path: String, _ file: Message.Offer.File) async -> Bool {
        var status = stat()
        guard stat(path, &status) == 0, status.st_mode & S_IFMT == S_IFREG, UInt64(status.st_size) == file.size else {
            return false
        }
        return (try? await BlockingPool.shared.run { try ChunkDigests.digest(of: path) }) == file.digest
    }

    /// Where a disk is here, and how the command line speaks of it.
    func placement(
        _ offer: Message.Offer,
        _ reference: GuestCommandLine.PathReference,
        keepsBacking: Set<String>
    ) -> GuestCommandLine.Placement {
        guard let disk = offer.disks.first(where: { $0.path == reference.path }) else {
            return .init(path: reference.path)
        }
        let path = imagePath(disk, offer)
        var placement = GuestCommandLine.Placement(path: path, format: disk.format)
        placement.changesFormat = disk.format != disk.sourceFormat
        placement.isFlattened = !keepsBacking.contains(disk.name)
        if let size = IncomingImages.deviceSize(path) {
            placement.isDevice = true
            if size != disk.size { placement.size = disk.size }
        }
        return placement
    }

    /// Where what QEMU makes goes.
    func output(_ path: String, _ offer: Message.Offer, _ names: inout Set<String>) -> String {
        if path == "/dev/null" { return path }
        var name = Self.lastComponent(path)
        while !names.insert(name).inserted { name = "x-\(name)" }
        return "\(agent.guests.directory(of: offer.guest))/run/\(name)"
    }

    /// Makes the images and their exports.
    func makeImages(
        _ offer: Message.Offer,
        _ disks: IncomingDisks,
        files: [String: String],
        _ secrets: [String: SecretBytes]
    ) async throws {
        let migrations = agent.migrations
        let paths = offer.disks.map { imagePath($0, offer) }
        if let problem = try await BlockingPool.shared.run({
            try DeviceHolder.letGo(paths, of: offer.guest, migrations)
        })
        .first {
            throw GuestError(problem)
        }
        for disk in offer.disks {
            var secret: SecretBytes?
            if let id = disk.keySecret {
                guard let known = secrets[id] else {
                    throw GuestError("The secret '\(id)' of \(disk.name) did not come")
                }
                secret = known
            }
            try await disks.images.create(
                disk,
                at: imagePath(disk, offer),
                export: exportName(disk),
                backing: keptBacking.contains(disk.name) ? disk.backing.first?.path : nil,
                secret: secret,
                header: files[disk.headerName],
                for: peer.name
            )
        }
        // Nobody else has a use for the headers.
        for disk in offer.disks where disk.isContainer { if let header = files[disk.headerName] { unlink(header) } }
    }

    /// The guest's command line for this host.
    func makeRecord(
        _ offer: Message.Offer,
        files: [String: String],
        _ secrets: [String: SecretBytes]
    ) async throws -> GuestRecord {
        let run = "\(agent.guests.directory(of: offer.guest))/run"
        try DurableFile.makeDirectory(run)
        var outputs: Set<String> = []
        let facts = try await facts(offer)
        let relocation = try offer.commandLine.relocated(for: facts, origin: offer.origin) { reference in
            switch reference.kind {
            case .disk:
                guard offer.disks.contains(where: { $0.path == reference.path }) else {
                    throw GuestError("The disk \(reference.path) of \(reference.option) is not in the offer")
                }
                return self.placement(offer, reference, keepsBacking: self.keptBacking)
            case .file:
                guard let path = files[reference.path] else {
                    throw GuestError("The file \(reference.path) of \(reference.option) is not in the offer")
                }
                guard ImageHeader.isAlone(path) else {
                    throw GuestError(
                        "The file \(reference.path) of \(reference.option) refers to other files of this host"
                    )
                }
                return .init(path: path)
            case .output: return .init(path: self.output(reference.path, offer, &outputs))
            case .backing:
                // What is under a disk is what was compared, and nothing else.
                guard
                    offer.disks.contains(where: { disk in
                        self.keptBacking.contains(disk.name) && disk.backing.contains { $0.path == reference.path }
                    })
                else { throw GuestError("The image \(reference.path) is not under a disk of the offer") }
                return .init(path: reference.path)
            }
        }
        var arguments = relocation.arguments
        arguments[0] = localProgram(arguments[0]) ?? arguments[0]
        for id in relocation.secrets where secrets[id] == nil {
            throw GuestError("The secret '\(id)' of the guest did not come")
        }
        var record = GuestRecord(
            name: offer.guest,
            commandLine: GuestCommandLine(arguments: arguments, directory: run)
        )
        if !relocation.secrets.isEmpty { record.secrets = relocation.secrets.sorted() }
        record.confinement = GuestConfinement(
            policy: policy ?? agent.configuration.confinement,
            imageDirectory: imageDirectory(offer),
            files: offer.disks.filter { keptBacking.contains($0.name) }.flatMap(\.backing).map(\.path),
            filtersSystemCalls: facts.hasSystemCallFilter
        )
        return record
    }
}
