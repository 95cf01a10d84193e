internal import CLinux
internal import Emulator
internal import Glibc
internal import IO
internal import Migration
internal import TLS

extension IncomingMigration {
    func exportName(_ disk: Message.Offer.Disk) -> String { "\(id)/\(disk.name)" }
    /// What the offer is, and where all of it would be on this host.
    func offered(_ offer: Message.Offer) -> OfferedGuest {
        OfferedGuest(
            offer,
            images: agent.configuration.imageDirectory,
            run: "\(agent.guests.directory(of: offer.guest))/run",
            allowed: agent.configuration.allowedDirectories
        )
    }
    func imageDirectory(_ offer: Message.Offer) -> String { offered(offer).imageDirectory }
    func imagePath(_ disk: Message.Offer.Disk, _ offer: Message.Offer) -> String { offered(offer).imagePath(disk) }

    /// Where this migration puts the files that come with the guest.
    func fileStore(_ offer: Message.Offer) -> String {
        "\(imageDirectory(offer))/\(OfferedGuest.fileDirectory)/\(id)"
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

    /// Everything that can be known before anything is made.
    func check(_ offer: Message.Offer) async -> [Obstacle] {
        var obstacles: [Obstacle] = []
        do {
            if let known = try agent.guests.load(offer.guest) {
                previous = known
                if known.process?.isRunning == true {
                    obstacles.append(.init(.leftovers, "A guest '\(offer.guest)' runs on this host already"))
                } else if known.released == nil {
                    obstacles.append(.init(.leftovers, "A guest '\(offer.guest)' is defined on this host already"))
                }
            }
        } catch { obstacles.append(.init(.leftovers, "\(error)")) }
        let program = offer.commandLine.arguments[0]
        if let found = localProgram(program) {
            do {
                if try await !facts(offer).machines.contains(offer.machine) {
                    obstacles.append(
                        .init(.machine, "\(found) on this host does not know the machine type '\(offer.machine)'")
                    )
                }
            } catch { obstacles.append(.init(.programs, "\(error)")) }
        } else {
            obstacles.append(.init(.programs, "The QEMU program '\(program)' is not installed on this host"))
        }
        let directory = agent.configuration.imageDirectory
        if access(directory, W_OK) != 0 {
            obstacles.append(
                .init(.space, "Cannot write the image directory \(directory): \(String(cString: strerror(errno)))")
            )
        } else {
            // What is here of a disk already is known later, and the rest is looked at then.
            if let reason = shortage(offer, without: await mayBeSeeded(offer)) {
                obstacles.append(.init(.space, reason))
            }
        }
        if let reason = DescriptorBudget.shortage(disks: offer.disks.count) {
            obstacles.append(Obstacle(.kernel, "The destination agent: \(reason)"))
        }
        obstacles += await problemsOfTemplates(offer).map { Obstacle(.files, $0) }
        var names: Set<String> = []
        for disk in offer.disks {
            let path = imagePath(disk, offer)
            if !names.insert(path).inserted {
                obstacles.append(.init(.files, "Two disks would both become \(path)"))
            }
            if let size = IncomingImages.deviceSize(path) {
                if disk.format != "raw" {
                    obstacles.append(
                        .init(.files, "The image \(path) is a block device, which can only be raw; use --format raw")
                    )
                } else if size < disk.size {
                    obstacles.append(
                        .init(.space, "The block device \(path) has \(size) bytes, the disk needs \(disk.size)")
                    )
                } else if !DeviceHolder.isHeld(path, for: offer.guest, agent.migrations),
                    let holder = Self.deviceHolder(path)
                {
                    obstacles.append(.init(.files, "The block device \(path) cannot be used: \(holder)"))
                }
            } else if DurableFile.exists(path) {
                obstacles.append(.init(.leftovers, "The image \(path) exists already"))
            }
        }
        return obstacles
    }

    /// Why there is no room for the disks but for some; nil when there is.
    func shortage(_ offer: Message.Offer, without seeded: Set<String>) -> String? {
        let directory = agent.configuration.imageDirectory
        let needed = offer.disks.filter {
            !seeded.contains($0.name) && IncomingImages.deviceSize(imagePath($0, offer)) == nil
        }
        .reduce(0) { $0 + $1.allocated }
        let free = xd_free_bytes(directory)
        // Below this a file system is full for all practical purposes.
        guard free < needed + (1 << 20) else { return nil }
        return
            "The image directory \(directory) has \(HostFigures.text(free)) free, the disks need at least \(HostFigures.text(needed))"
    }

    /// Why a block device is not free; nil when it is.
    private static func deviceHolder(_ path: String) -> String? {
        let fd = Glibc.open(path, O_RDWR | O_EXCL | O_CLOEXEC)
        if fd < 0 { return String(cString: strerror(errno)) }
        close(fd)
        return nil
    }

    /// The program of the offer by its path, or by its name in PATH. The name must be one of QEMU's: the offer says
    /// which machine to start, not which program of this host to run. A path counts where this host's programs are.
    func localProgram(_ program: String) -> String? {
        let name = OfferedGuest.lastComponent(program)
        guard name.hasPrefix("qemu-system-") || ["qemu-kvm", "kvm"].contains(name) else { return nil }
        if program.hasPrefix("/"), isProgramDirectory(of: program), let found = EmulatorProcess.find(program) {
            return found
        }
        return EmulatorProcess.find(name)
    }

    private func isProgramDirectory(of program: String) -> Bool {
        let directory = String(program.prefix(upTo: program.lastIndex(of: "/") ?? program.startIndex))
        let search = getenv("PATH").map { String(cString: $0) } ?? ""
        let known = search.split(separator: ":").map(String.init) + ["/usr/bin", "/usr/local/bin", "/usr/libexec"]
        return known.contains(directory) || agent.configuration.allowedDirectories.contain(program)
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

    /// Where each file of the offer is on this host; what is not here is asked for.
    func findFiles(_ offer: Message.Offer, _ connection: MessageConnection) async throws -> [String: String] {
        let store = fileStore(offer)
        let earlier = "\(imageDirectory(offer))/\(OfferedGuest.fileDirectory)"
        let stores = DurableFile.list(earlier).map { "\(earlier)/\($0)" }
        var found: [String: String] = [:]
        var missing: [Int] = []
        var asked: Set<String> = []
        for (index, file) in offer.files.enumerated() {
            guard file.digest.utf8.count == 64, file.digest.allSatisfy(\.isHexDigit) else {
                throw GuestError("The offer is malformed")
            }
            var candidates = stores.map { "\($0)/\(file.digest)" }
            if agent.configuration.allowedDirectories.contain(file.path), policy?.canRead(file.path) ?? true {
                candidates.append(file.path)
            }
            for candidate in candidates where found[file.path] == nil {
                if try await fileDigests.matches(candidate, file) { found[file.path] = candidate }
            }
            if found[file.path] == nil {
                // Two paths may lead to the same contents.
                if asked.insert(file.digest).inserted { missing.append(index) }
                found[file.path] = "\(store)/\(file.digest)"
            }
        }
        if missing.isEmpty { return found }
        if conversation.isEmpty { throw ChannelError(.closed, "The connection to the source was lost") }
        try await BlockingPool.shared.run {
            // The directory above may belong to a guest that was here: what it put there is not followed.
            var status = stat()
            if lstat(earlier, &status) == 0, status.st_mode & S_IFMT != S_IFDIR {
                throw GuestError("\(earlier) is in the way: it is no directory; remove it")
            }
            guard lstat(store, &status) != 0 else { throw GuestError("\(store) is in the way; remove it") }
            try DurableFile.makeDirectory(store)
        }
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
            guard try await fileDigests.matches(temporary, file) else {
                unlink(temporary)
                throw GuestError("The file \(file.path) arrived damaged")
            }
            guard rename(temporary, "\(store)/\(file.digest)") == 0 else {
                throw FileError.system("rename \(temporary)", errno)
            }
        }
        return found
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
            if try await begin(disk, offer, disks) { continue }
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
        // Nothing has a use for the headers any more.
        let kept = Set(offer.files.filter { !$0.path.hasPrefix("header:") }.map(\.digest))
        for file in offer.files where file.path.hasPrefix("header:") && !kept.contains(file.digest) {
            unlink("\(fileStore(offer))/\(file.digest)")
        }
    }

    /// Begins a disk with what is here already.
    ///
    /// - Returns: false when there is nothing, or it cannot be used any more.
    private func begin(_ disk: Message.Offer.Disk, _ offer: Message.Offer, _ disks: IncomingDisks) async throws -> Bool
    {
        let path = imagePath(disk, offer)
        guard IncomingImages.deviceSize(path) == nil else {
            (oldImages[disk.name], seedProofs[disk.name]) = (nil, nil)
            return false
        }
        if let template = try template(disk) {
            try await disks.images.copy(template, disk, at: path, export: exportName(disk), for: peer.name, abandonment)
            seedProofs[disk.name] = ""
            return true
        }
        guard let image = oldImages[disk.name] else { return false }
        do {
            try await disks.images.use(
                placed(image, of: disk, offer),
                for: disk,
                export: exportName(disk),
                for: peer.name
            )
            return true
        } catch {
            log(.warning, "Migration \(id): \(disk.name) is sent as a whole: \(error)")
            (oldImages[disk.name], seedProofs[disk.name]) = (nil, nil)
            // A later agent must not take what is made now for the old image.
            try await save(isReady: false)
            return false
        }
    }

    /// The guest's command line for this host.
    func makeRecord(
        _ offer: Message.Offer,
        files: [String: String],
        _ secrets: [String: SecretBytes]
    ) async throws -> GuestRecord {
        let run = "\(agent.guests.directory(of: offer.guest))/run"
        let (guests, guest) = (agent.guests, offer.guest)
        try await BlockingPool.shared.run {
            try DurableFile.makeDirectory(run)
            guests.removeOutputLinks(of: guest)
        }
        let facts = try await self.facts(offer)
        let (offered, kept) = (self.offered(offer), keptBacking)
        // How long a command line takes is up to the source.
        let relocation = try await BlockingPool.decoding.run {
            try offered.relocation(
                for: facts,
                files: files,
                keepsBacking: kept,
                deviceSize: IncomingImages.deviceSize
            )
        }
        var arguments = relocation.arguments
        arguments[0] = localProgram(arguments[0]) ?? arguments[0]
        for id in relocation.secrets where secrets[id] == nil {
            throw GuestError("The secret '\(id)' of the guest did not come")
        }
        let commandLine = GuestCommandLine(arguments: arguments, directory: run)
        let names = try chooseTaps(offer, commandLine)
        var record = GuestRecord(name: offer.guest, commandLine: try commandLine.renamingTaps(names))
        if !taps.isEmpty { record.taps = taps }
        if !relocation.secrets.isEmpty { record.secrets = relocation.secrets.sorted() }
        record.arrival = agent.ledger.arrival(id)
        record.placement = offer.placement
        record.origin = origin(of: offer)
        record.confinement = GuestConfinement(
            policy: policy ?? agent.configuration.confinement,
            imageDirectory: imageDirectory(offer),
            files: offer.disks.filter { kept.contains($0.name) }.flatMap(\.backing).map(\.path),
            filtersSystemCalls: facts.hasSystemCallFilter
        )
        return record
    }

    /// Where the guest was at home before it first moved; nil when that is this host.
    private func origin(of offer: Message.Offer) -> GuestRecord.Origin? {
        // It comes back: what was known of it here is still true.
        if let previous { return previous.origin }
        guard let home = offer.home, home.identity != peer.name else {
            return GuestRecord.Origin(identity: peer.name, address: sourceAddress)
        }
        return GuestRecord.Origin(identity: home.identity, address: home.address, toldBy: peer.name)
    }
}
