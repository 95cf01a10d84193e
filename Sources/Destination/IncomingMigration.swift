internal import CLinux
internal import Emulator
internal import FoundationEssentials
internal import Glibc
internal import IO
internal import Migration
internal import TLS

/// One migration, seen from the destination.
///
/// Until PREPARED is durable a lost connection ends it and leaves nothing behind. From then on only the source can: the
/// guest may have been released, so everything is kept until RELEASE or ABORT comes, over a new connection if need be.
final class IncomingMigration: @unchecked Sendable {
    // Unchecked: confined to the agent's control loop.

    enum State: String, Codable {
        case new, offered, prepared, owner, done, aborted
    }

    /// What a later agent needs to take this migration up.
    private struct Saved: Codable {
        var peer: TLSPeer
        var offer: Message.Offer
        /// What this host knew of a guest of the same name, which had left it earlier.
        var previous: GuestRecord?
        /// Whether READY was said: a source that was lost may come back and go on.
        var isReady: Bool?
    }

    let id: String
    let peer: TLSPeer
    private unowned let agent: DestinationAgent
    private var state = State.new
    private var offer: Message.Offer?
    private var images: IncomingImages?
    private var record: GuestRecord?
    private var monitor: QMPClient?
    private var journal: Journal?
    private var guestLock: FileLock?
    private var ownedDigests: [String: String] = [:]
    private var finalDigests: Task<Void, any Error>?
    private var files: FileReceiver?
    /// The blank copy of the guest, while its move is rehearsed.
    private var shadow: ShadowEmulator?
    /// The values of the guest's secrets; never on a disk.
    private var secrets: [String: SecretBytes] = [:]
    /// Bytes of a PROBE that are still to come.
    private var probe = 0
    private let order = AsyncLock()
    private var previous: GuestRecord?
    private var hasStarted = false
    private var outputs: Set<String> = []
    private var connections: [MessageConnection] = []
    private var waitingMessages = 0
    /// Whether the guest was resumed here, after OWNER.
    private var runsHere = false
    /// Whether the only connection was lost while a step was under way.
    private var isCutOff = false
    /// Whether READY was said.
    private var isReady = false
    /// Whether QEMU was told to take a stream: it takes one only once.
    private var hasListened = false
    /// Ends the wait for a source that was lost.
    private var absence: LoopTimer?
    /// Takes digests of what has settled while the memory comes.
    private var settling: Task<Void, Never>?
    /// What the source says of its disks.
    private var proofs: [String: DiskProof] = [:]
    private var isFull = false
    /// Why this migration was given up, once that is durable: the guest can never run here by it.
    private var refusal: String?
    /// Whether OWNER could be written, but perhaps not durably.
    private var isOwnerInDoubt = false
    /// Whether it could not be taken up after a restart of the agent; that is tried again.
    private(set) var isStuck = false

    init(_ id: String, peer: TLSPeer, agent: DestinationAgent) {
        self.id = id
        self.peer = peer
        self.agent = agent
    }

    /// A migration that ended here may be asked for again by a source that did not hear OWNED: the journal answers.
    static func open(_ id: String, peer: TLSPeer, agent: DestinationAgent) -> IncomingMigration {
        let migration = IncomingMigration(id, peer: peer, agent: agent)
        if let records = try? Journal.read(agent.migrations.journal(of: id)),
            case .accepted(_, peer.name, _) = records.first,
            records.ownerDigests != nil || records.isRolledBack
        {
            if let digests = records.ownerDigests {
                migration.state = .done
                migration.ownedDigests = digests
            } else {
                migration.state = .aborted
                for case .rolledBack(let reason) in records { migration.refusal = reason }
            }
        }
        return migration
    }

    var isOver: Bool { (state == .new && connections.isEmpty && !isStuck) || state == .done || state == .aborted }
    private var directory: String { agent.migrations.directory(of: id) }
    private var incomingSocket: String { "\(agent.guests.directory(of: offer?.guest ?? ""))/incoming.sock" }
    private var log: Log { agent.log }

    // MARK: The conversation

    func serve(_ connection: MessageConnection) async {
        absence?.cancel()
        // The source has one: what is still there of an earlier one is a connection whose loss was not noticed here.
        for earlier in connections {
            earlier.channel.abort(ChannelError(.closed, "The source has connected again"))
        }
        connections.append(connection)
        do {
            try await connection.send(.welcome(.init(state: state.rawValue, nbdPort: agent.nbdPort)))
            try await withThrowingDiscardingTaskGroup { group in
                do {
                    while true {
                        switch try await connection.receive() {
                        case .data(let bytes) where probe > 0: try await receiveProbe(bytes.count, connection)
                        case .data(let bytes): try await files?.receive(bytes)
                        case .message(.probe(let count)): try await beginProbe(count, connection)
                        case .message(.ping): try await connection.send(.pong)
                        case .message(.file(let index)): try files?.begin(index)
                        case .message(let message):
                            guard waitingMessages < 8 else {
                                throw ChannelError(.protocolViolation, "too many messages at once")
                            }
                            waitingMessages += 1
                            if case .abort = message { images?.stopDigests() }
                            // A long step must not keep pings from being answered.
                            group.addTask(executorPreference: self.agent.loop) {
                                await self.order.acquire()
                                defer {
                                    self.order.release()
                                    self.waitingMessages -= 1
                                }
                                await self.answer(message, connection)
                            }
                        }
                    }
                } catch {
                    // A step that is under way must not wait for what will never come.
                    isCutOff = connections.count == 1
                    if isCutOff {
                        files?.abandon(error)
                        if state == .offered, !isReady { images?.stopDigests() }
                    }
                    throw error
                }
            }
        } catch {
            if state == .new || state == .offered {
                let closed = (error as? ChannelError)?.code == .closed
                if state == .offered || !closed { log(.warning, "Migration \(id): \(error)") }
            }
        }
        connections.removeAll { $0 === connection }
        // Whoever lost the connection before PREPARED rolls back; so does the other side.
        if connections.isEmpty {
            switch state {
            case .offered where isReady: waitForSource()
            case .new, .offered: await giveUp("The connection to the source was lost")
            case .owner: if runsHere { finish() } else { tryAgain() }
            case .prepared, .done, .aborted: break
            }
        }
    }

    /// The source may come back: the link was cut, or its network card was changed.
    private func waitForSource() {
        log(
            .warning,
            "Migration \(id): the connection to the source was lost; waiting for \(agent.configuration.patience)"
        )
        absence?.cancel()
        absence = agent.loop.schedule(after: agent.configuration.patience) {
            guard self.state == .offered, self.connections.isEmpty else { return }
            Task(executorPreference: self.agent.loop) {
                await self.order.acquire()
                defer { self.order.release() }
                guard self.state == .offered, self.connections.isEmpty else { return }
                await self.giveUp("The source did not come back within \(self.agent.configuration.patience)")
            }
        }
    }

    /// Handles a message; what goes wrong before PREPARED ends the migration and is told to the source.
    private func answer(_ message: Message, _ connection: MessageConnection) async {
        do {
            try await handle(message, connection)
        } catch {
            log(.warning, "Migration \(id): \(message.name): \(error)")
            // The step went well, and only its answer did not get through: it will be asked for again.
            if isReady, let lost = error as? ChannelError, [.closed, .truncated, .timedOut].contains(lost.code) {
                return
            }
            // An ABORT in answer to ABORT would say that this migration is over, durably.
            if case .abort = message {
                connection.channel.abort(ChannelError(.closed, "ABORT failed: \(error)"))
                return
            }
            if state == .new || state == .offered {
                await giveUp("\(error)")
                try? await connection.send(.abort("\(error)"))
            } else {
                // Not the end of the migration, but the source's operator should know what holds it up.
                try? await connection.send(.abort("\(message.name) failed on the destination: \(error)"))
            }
            connection.channel.abort(ChannelError(.closed, "\(message.name) failed: \(error)"))
        }
    }

    /// QEMU ended while it waited for the guest: the source hears why, in QEMU's words.
    private func emulatorEnded() {
        guard state == .offered, let offer else { return }
        let words = EmulatorProcess.tail(of: agent.guests.log(of: offer.guest))
        let reason = "QEMU on the destination ended: \(words.isEmpty ? "it said nothing" : words)"
        log(.warning, "Migration \(id): \(reason)")
        // A QEMU whose stream was cut ends with EIO, and one that was killed without a word: the next STREAM starts another.
        if isReady, words.isEmpty || words.contains("Input/output error") { return }
        for connection in connections {
            Task(executorPreference: agent.loop) { try? await connection.send(.abort(reason)) }
        }
    }

    private func handle(_ message: Message, _ connection: MessageConnection) async throws {
        switch (message, state) {
        case (.secrets(let values), .new), (.secrets(let values), .offered):
            for (id, text) in values {
                guard secrets.count < 256, var bytes = Base64.decode(text.utf8) else {
                    throw GuestError("A secret of the offer is not Base64")
                }
                secrets[id] = try SecretBytes(wiping: &bytes)
            }
        case (.offer(let offer), .new): try await accept(offer, connection)
        case (.rehearsed(let rehearsed), .offered): try await proceed(rehearsed, connection)
        case (.mirrored, .offered):
            try await images?.updateDigests(isUrgent: false)
            try await connection.send(.mirrored)
        case (.stream, .offered) where isReady:
            let monitor = try await freshEmulator()
            unlink(incomingSocket)
            hasListened = true
            try await monitor.migrateIncoming(socket: incomingSocket)
            settle()
            try await connection.send(.stream)
        case (.prepared(let prepared), .offered), (.prepared(let prepared), .prepared):
            try await prepare(prepared)
            try await connection.send(.prepared(.init()))
        case (.release(let release), .prepared), (.release(let release), .owner), (.release(let release), .done):
            do {
                if state != .done { try await own(release) }
                try await connection.send(.owned(.init(digests: ownedDigests)))
            } catch let refused as Refusal {
                try await connection.send(.refused(refused.reasons.joined(separator: "; ")))
            }
        case (.release, .aborted):
            try makeRefusalDurable("It was given up here")
            guard let refusal else { throw GuestError("This migration was not begun here") }
            try await connection.send(.refused(refusal))
        case (.done, .owner), (.done, .done):
            finish()
            try await connection.send(.done)
        case (.abort(let reason), .new), (.abort(let reason), .offered):
            await giveUp(reason)
            try makeRefusalDurable(reason)
            try await connection.send(.abort(reason))
        case (.abort(let reason), .prepared) where !isOwnerInDoubt:
            try await refuse(reason)
            try await connection.send(.abort(reason))
        case (.abort(let reason), .aborted):
            try makeRefusalDurable(reason)
            try await connection.send(.abort(reason))
        default:
            throw ChannelError(.protocolViolation, "\(message.name) is not due in state \(state.rawValue)")
        }
    }

    // MARK: OFFER

    private func accept(_ offer: Message.Offer, _ connection: MessageConnection) async throws {
        self.offer = offer
        state = .offered
        try await answering(offer, connection) {
            try begin(offer)
            let reasons = await check(offer)
            if !reasons.isEmpty { throw Refusal(reasons: reasons) }
            try await connection.send(.shadow(try await startShadow(offer)))
        }
    }

    /// Runs a step of an offer; what fails is told as the reason why the guest is not taken.
    private func answering(
        _ offer: Message.Offer,
        _ connection: MessageConnection,
        _ body: () async throws -> Void
    ) async throws {
        do {
            try await body()
        } catch let error as ChannelError where error.code == .closed || error.code == .truncated {
            throw error
        } catch {
            let reasons = (error as? Refusal)?.reasons ?? ["\(error)"]
            log(.warning, "Migration \(id): refused guest '\(offer.guest)': \(reasons.joined(separator: "; "))")
            await giveUp(reasons.joined(separator: "; "))
            try await connection.send(.ready(.init(reasons: reasons)))
        }
    }

    /// The rehearsal is over: what it showed decides whether anything is made.
    private func proceed(_ rehearsed: Message.Rehearsed, _ connection: MessageConnection) async throws {
        guard let offer, shadow != nil else {
            throw ChannelError(.protocolViolation, "REHEARSED is not due in state \(state.rawValue)")
        }
        try await answering(offer, connection) {
            if let reason = await endShadow() { throw Refusal(reasons: [reason]) }
            if offer.isRehearsal {
                try await connection.send(.ready(.init()))
                return
            }
            let found = try await findFiles(offer, connection)
            let keeps = await keptBacking(offer, rehearsed)
            try await startGuest(offer, files: found, keepsBacking: keeps)
            isReady = true
            try save(offer)
            let exports = Dictionary(uniqueKeysWithValues: offer.disks.map { ($0.name, exportName($0)) })
            try await connection.send(
                .ready(.init(nbdPort: agent.nbdPort, exports: exports, keepsBacking: keeps.sorted()))
            )
            log(.info, "Migration \(id): receiving guest '\(offer.guest)' from \(peer.name)")
        }
    }

    // MARK: PROBE

    private func beginProbe(_ count: Int, _ connection: MessageConnection) async throws {
        guard probe == 0, files == nil, (0...(64 << 20)).contains(count) else {
            throw ChannelError(.protocolViolation, "PROBE of \(count) bytes is not due")
        }
        if count == 0 { try await connection.send(.probe(0)) } else { probe = count }
    }

    private func receiveProbe(_ count: Int, _ connection: MessageConnection) async throws {
        probe -= min(count, probe)
        if probe == 0 { try await connection.send(.probe(0)) }
    }

    // MARK: the rehearsal

    private func startShadow(_ offer: Message.Offer) async throws -> Message.Shadow {
        var sizes = offer.sizes
        let relocation = try offer.commandLine.relocated { reference in
            var placement = GuestCommandLine.Placement(path: reference.path)
            switch reference.kind {
            case .disk: placement = self.placement(offer, reference, keepsBacking: [])
            case .file:
                let file = offer.files.first { $0.path == reference.path }
                placement.path = "\(agent.configuration.imageDirectory)/.files/\(file?.digest ?? "")"
            case .output: placement.path = output(reference.path, offer, &self.outputs)
            case .backing: break
            }
            if let size = offer.sizes[reference.path] { sizes[placement.path] = size }
            return placement
        }
        outputs = []
        let line = GuestCommandLine(arguments: relocation.arguments, directory: "/")
        let problems = try HostResources(line).problems()
        if !problems.isEmpty { throw Refusal(reasons: problems) }
        let shadow = try await ShadowEmulator.start(
            line,
            program: localProgram(offer.commandLine.program),
            .init(sizes: sizes, memory: offer.memory, memoryID: offer.memoryID),
            isIncoming: true,
            on: agent.loop
        )
        guard state == .offered else {
            await shadow.stop()
            throw GuestError("The migration was given up meanwhile")
        }
        self.shadow = shadow
        var warnings: [String] = []
        let free = xd_free_bytes(agent.configuration.imageDirectory)
        let most = offer.disks.filter { IncomingImages.deviceSize(imagePath($0, offer)) == nil }.reduce(0) {
            $0 + $1.size
        }
        if free < most {
            warnings.append(
                "The image directory on the destination has \(free) bytes free; if the guest fills its disks, they need \(most)"
            )
        }
        let backing = offer.disks.flatMap(\.backing).filter { file in
            var status = stat()
            return stat(file.path, &status) == 0 && status.st_mode & S_IFMT == S_IFREG
                && UInt64(status.st_size) == file.size
        }
        return Message.Shadow(
            fingerprint: try await MachineFingerprint(of: shadow.monitor),
            emulatorVersion: shadow.monitor.version,
            changes: relocation.changes,
            warnings: warnings,
            backing: backing.map(\.path),
            clock: Int64(Date.now.timeIntervalSince1970 * 1000),
            free: free
        )
    }

    /// Ends the blank copy.
    ///
    /// - Returns: why it did not take the stream; nil when it did.
    private func endShadow() async -> String? {
        guard let shadow else { return nil }
        self.shadow = nil
        var reason: String? = "The blank copy of the guest was not sent"
        for _ in 0..<300 {
            guard let state = try? await shadow.monitor.migrationState() else {
                // QEMU ends when it cannot load what comes.
                let words = shadow.words
                reason = "QEMU on the destination does not take the guest: \(words.isEmpty ? "it said nothing" : words)"
                break
            }
            if state.status == "completed" {
                reason = nil
                break
            }
            await agent.loop.sleep(for: .milliseconds(10))
        }
        await shadow.stop()
        return reason
    }

    /// The disks whose backing images are here with the same contents.
    private func keptBacking(_ offer: Message.Offer, _ rehearsed: Message.Rehearsed) async -> Set<String> {
        var kept: Set<String> = []
        for disk in offer.disks where !disk.backing.isEmpty {
            // What a source could have put here itself is not taken for an image of this host.
            let isOwn = disk.backing.allSatisfy {
                DurableFile.resolve($0.path, in: "/").hasPrefix(agent.configuration.imageDirectory + "/") == false
            }
            var isSame = isOwn && disk.backing.last.map { ImageHeader.isAlone($0.path) } ?? false
            for file in disk.backing where isSame {
                var known = file
                known.digest = rehearsed.backing[file.path] ?? ""
                if await !Self.matches(file.path, known) {
                    isSame = false
                    break
                }
            }
            if isSame { kept.insert(disk.name) }
        }
        return kept
    }

    private struct Refusal: Error { let reasons: [String] }

    private func exportName(_ disk: Message.Offer.Disk) -> String { "\(id)/\(disk.name)" }
    private func imageDirectory(_ offer: Message.Offer) -> String {
        "\(agent.configuration.imageDirectory)/\(offer.guest)"
    }

    private func begin(_ offer: Message.Offer) throws {
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
        guard let lock = try agent.migrations.lock(guest: offer.guest) else {
            throw GuestError("Guest '\(offer.guest)' is being migrated on this host already")
        }
        guestLock = lock
        if offer.isRehearsal { return }
        guard !DurableFile.exists(agent.migrations.journal(of: id)) else {
            throw GuestError("The migration \(id) has been here before")
        }
        try DurableFile.makeDirectory(directory)
        let journal = try Journal(creating: agent.migrations.journal(of: id))
        try journal.append(.accepted(guest: offer.guest, source: peer.name, order: agent.migrations.nextOrder()))
        self.journal = journal
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
    private func check(_ offer: Message.Offer) async -> [String] {
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
                let machines = try await EmulatorProbe.machines(of: found)
                if !machines.contains(offer.machine) {
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
                } else if let holder = Self.deviceHolder(path) {
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
    private func localProgram(_ program: String) -> String? {
        let name = Self.lastComponent(program)
        guard name.hasPrefix("qemu-system-") || ["qemu-kvm", "kvm"].contains(name) else { return nil }
        return (program.hasPrefix("/") ? EmulatorProcess.find(program) : nil) ?? EmulatorProcess.find(name)
    }

    private static func lastComponent(_ path: String) -> String {
        let name = path.split(separator: "/").last.map(String.init) ?? ""
        return name.isEmpty || name == "." || name == ".." ? "unnamed" : name
    }

    /// The image keeps the name that it has on the source; its directory is the guest's own.
    private func imagePath(_ disk: Message.Offer.Disk, _ offer: Message.Offer) -> String {
        "\(imageDirectory(offer))/\(Self.lastComponent(disk.path))"
    }

    /// Where each file of the offer is on this host; what is not here is asked for.
    private func findFiles(_ offer: Message.Offer, _ connection: MessageConnection) async throws -> [String: String] {
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
                if await Self.matches(candidate, file) { found[file.path] = candidate }
            }
            if found[file.path] == nil {
                // Two paths may lead to the same contents.
                if asked.insert(file.digest).inserted { missing.append(index) }
                found[file.path] = stored
            }
        }
        if missing.isEmpty { return found }
        if isCutOff { throw ChannelError(.closed, "The connection to the source was lost") }
        try DurableFile.makeDirectory(store)
        let receiver = FileReceiver(offer.files, missing, store: store, migration: id)
        files = receiver
        defer { files = nil }
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
                throw ChannelError.system("rename \(temporary)", errno)
            }
        }
        return found
    }

    private static func matches(_ path: String, _ file: Message.Offer.File) async -> Bool {
        var status = stat()
        guard stat(path, &status) == 0, status.st_mode & S_IFMT == S_IFREG, UInt64(status.st_size) == file.size else {
            return false
        }
        return (try? await BlockingPool.shared.run { try ChunkDigests.digest(of: path) }) == file.digest
    }

    /// Where a disk is here, and how the command line speaks of it.
    private func placement(
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
    private func output(_ path: String, _ offer: Message.Offer, _ names: inout Set<String>) -> String {
        if path == "/dev/null" { return path }
        var name = Self.lastComponent(path)
        while !names.insert(name).inserted { name = "x-\(name)" }
        return "\(agent.guests.directory(of: offer.guest))/run/\(name)"
    }

    private func startGuest(_ offer: Message.Offer, files: [String: String], keepsBacking: Set<String>) async throws {
        let images = makeImages(offer)
        self.images = images
        // Before anything is made: a later agent finds here what it has to clean up.
        try save(offer)
        for disk in offer.disks {
            var secret: SecretBytes?
            if let id = disk.keySecret {
                guard let known = secrets[id] else {
                    throw GuestError("The secret '\(id)' of \(disk.name) did not come")
                }
                secret = known
            }
            try await images.create(
                disk,
                at: imagePath(disk, offer),
                export: exportName(disk),
                backing: keepsBacking.contains(disk.name) ? disk.backing.first?.path : nil,
                secret: secret,
                header: files[disk.headerName],
                for: peer.name
            )
            guard state == .offered else { throw GuestError("The migration was given up meanwhile") }
        }
        // Nobody else has a use for the headers.
        for disk in offer.disks where disk.isContainer { if let header = files[disk.headerName] { unlink(header) } }
        let run = "\(agent.guests.directory(of: offer.guest))/run"
        try DurableFile.makeDirectory(run)
        var outputs: Set<String> = []
        let relocation = try offer.commandLine.relocated { reference in
            switch reference.kind {
            case .disk:
                guard offer.disks.contains(where: { $0.path == reference.path }) else {
                    throw GuestError("The disk \(reference.path) of \(reference.option) is not in the offer")
                }
                return self.placement(offer, reference, keepsBacking: keepsBacking)
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
                        keepsBacking.contains(disk.name) && disk.backing.contains { $0.path == reference.path }
                    })
                else { throw GuestError("The image \(reference.path) is not under a disk of the offer") }
                return .init(path: reference.path)
            }
        }
        var arguments = relocation.arguments
        arguments[0] = localProgram(arguments[0]) ?? arguments[0]
        var needed: [String: SecretBytes] = [:]
        for id in relocation.secrets {
            guard let secret = secrets[id] else { throw GuestError("The secret '\(id)' of the guest did not come") }
            needed[id] = secret
        }
        var record = GuestRecord(
            name: offer.guest,
            commandLine: GuestCommandLine(arguments: arguments, directory: run)
        )
        if !needed.isEmpty { record.secrets = needed.keys.sorted() }
        _ = try await startEmulator(record)
    }

    private func makeImages(_ offer: Message.Offer) -> IncomingImages {
        IncomingImages(
            directory: imageDirectory(offer),
            generation: agent.generation,
            exports: agent.exports,
            loops: agent.dataLoops
        )
    }

    /// A QEMU that can take the stream: the one that waits, or another one in the place of one that took a part of it.
    private func freshEmulator() async throws -> QMPClient {
        if let monitor, monitor.isConnected, !hasListened { return monitor }
        guard let offer, let known = try record ?? agent.guests.load(offer.guest) else {
            throw GuestError("The record of the guest is gone")
        }
        if let monitor {
            monitor.onDisconnect = nil
            monitor.close()
        }
        monitor = nil
        await known.process?.terminate(grace: .seconds(1))
        log(.info, "Migration \(id): a new QEMU waits for the memory of guest '\(offer.guest)'")
        return try await startEmulator(known)
    }

    private func startEmulator(_ known: GuestRecord) async throws -> QMPClient {
        guard let offer else { throw GuestError("There is no offer") }
        var record = known
        var needed: [String: SecretBytes] = [:]
        for id in record.secrets ?? [] {
            guard let secret = secrets[id] else { throw GuestError("The secret '\(id)' of the guest did not come") }
            needed[id] = secret
        }
        hasStarted = true
        hasListened = false
        let monitor = try await agent.guests.start(
            &record,
            extra: ["-S", "-incoming", "defer"],
            key: needed.isEmpty ? nil : try MasterKey(sealing: needed),
            on: agent.loop
        )
        self.record = record
        guard state == .offered else {
            monitor.close()
            await record.process?.terminate()
            throw GuestError("The migration was given up meanwhile")
        }
        self.monitor = monitor
        monitor.onDisconnect = { [weak self] in self?.emulatorEnded() }
        var capabilities = ["events", "return-path", "late-block-activate"]
        if offer.hasUUID { capabilities.append("validate-uuid") }
        try await monitor.setCapabilities(capabilities, to: true)
        return monitor
    }

    private func save(_ offer: Message.Offer) throws {
        let saved = Saved(
            peer: peer,
            offer: offer,
            previous: previous,
            isReady: isReady
        )
        try DurableFile.write(try JSONText.encode(saved), to: "\(directory)/incoming.json")
    }

    // MARK: STREAM

    /// Carries one of QEMU's connections.
    func serveStream(_ connection: MessageConnection) async throws {
        guard state == .offered,
            let target = shadow?.incomingSocket ?? (monitor != nil && hasListened ? incomingSocket : nil)
        else {
            try await connection.send(.abort("No stream is due"))
            return
        }
        let near = try await SocketChannel.connect(to: .unix(path: target), on: agent.loop)
        try await connection.send(.welcome(.init(state: state.rawValue)))
        try await StreamRelay.run(near, connection.channel)
    }

    // MARK: PREPARED, RELEASE

    /// Reads back what the guest still writes, so that little is left for the pause.
    private func settle() {
        guard settling == nil, let images else { return }
        settling = Task(executorPreference: agent.loop) {
            while self.state == .offered, !Task.isCancelled {
                await self.agent.loop.sleep(for: .milliseconds(500))
                if self.state == .offered, !Task.isCancelled, images.isStale {
                    try? await images.updateDigests(isUrgent: false)
                }
            }
        }
    }

    private func endSettling() async {
        settling?.cancel()
        images?.stopDigests()
        await settling?.value
        settling = nil
        images?.allowDigests()
    }

    private func prepare(_ prepared: Message.Prepared) async throws {
        guard state == .offered, let images, let journal else { return }
        // A journal is written only for what is still wanted.
        func check() throws { if state != .offered { throw GuestError("The migration was given up meanwhile") } }
        guard monitor?.isConnected == true, record?.process?.isRunning == true else {
            throw GuestError("QEMU does not run any more")
        }
        await endSettling()
        await images.closeExports()
        try await images.flush()
        proofs = prepared.proofs
        isFull = prepared.isFull
        // For an agent that takes this one's place. A host that falls takes QEMU with it, and then nothing is compared.
        try? saveProofs()
        try check()
        try journal.append(.prepared)
        state = .prepared
        secrets = [:]
        if isFull { images.markAll() }
        takeFinalDigests(images)
    }

    /// The last digests are taken while the source sends the rest of the memory.
    private func takeFinalDigests(_ images: IncomingImages) {
        finalDigests = Task(executorPreference: agent.loop) { try await images.updateDigests(isUrgent: true) }
    }

    private var proofsFile: String { "\(directory)/proofs.json" }

    private func saveProofs() throws {
        let bytes = try JSONText.encode(Message.Prepared(proofs: proofs, isFull: isFull))
        let fd = Glibc.open(proofsFile, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o600)
        guard fd >= 0 else { throw ChannelError.system("create \(proofsFile)", errno) }
        defer { close(fd) }
        try DurableFile.append(bytes, to: fd, path: proofsFile)
    }

    /// Gives a migration up that the source may have released, or may release yet: it will never run here, durably.
    private func refuse(_ reason: String) async throws {
        guard let journal else { throw GuestError("The journal of this migration is not open") }
        try journal.append(.rolledBack(reason: reason))
        refusal = reason
        await giveUp(reason)
    }

    /// A source that hears ABORT counts on it.
    private func makeRefusalDurable(_ reason: String) throws {
        guard refusal == nil, let journal else { return }
        try journal.append(.rolledBack(reason: reason))
        refusal = reason
    }

    private func own(_ release: Message.Release = .init()) async throws {
        guard let journal, let offer else {
            throw ChannelError(.protocolViolation, "RELEASE for a migration that is not there")
        }
        if state == .prepared {
            // A record that may be found later must not be contradicted: then it can only be written again.
            if !isOwnerInDoubt, let reason = try await flaw(release) {
                // The guest is whole where it came from, and nothing has happened here.
                log(.error, "Migration \(id): guest '\(offer.guest)' is refused: \(reason)")
                try await refuse(reason)
                throw Refusal(reasons: [reason])
            }
            try decide(journal, .owner(digests: ownedDigests))
            log(.info, "Migration \(id): this host owns guest '\(offer.guest)' now")
        }
        try await resumeGuest()
    }

    private func decide(_ journal: Journal, _ record: JournalRecord) throws {
        do {
            try journal.append(record)
        } catch let error as JournalError {
            if error.kind == .doubtful { isOwnerInDoubt = true }
            throw error
        }
        state = .owner
    }

    /// An operator says that the source will never run the guest: it belongs here, if it is here.
    func take(by operatorName: String) async throws -> String {
        await order.acquire()
        defer { order.release() }
        guard state == .prepared, let journal, let offer else {
            throw GuestError("Migration \(id) is in the state '\(state.rawValue)': there is nothing to decide here")
        }
        if let reason = try await flaw(.init()) { throw GuestError("The guest cannot run here: \(reason)") }
        try decide(journal, .taken(by: operatorName))
        log(.warning, "Migration \(id): \(operatorName) has taken guest '\(offer.guest)' for this host")
        try await resumeGuest()
        if connections.isEmpty { finish() }
        return offer.guest
    }

    /// What is wrong with the guest as it is here; nil when it may run.
    private func flaw(_ release: Message.Release) async throws -> String? {
        guard let offer, let process = record?.process, process.isRunning else {
            return "QEMU of the guest has ended on the destination"
        }
        do {
            try await waitUntilLoaded(try await connectMonitor())
        } catch let error where !process.isRunning {
            let words = EmulatorProcess.tail(of: agent.guests.log(of: offer.guest))
            return "QEMU of the guest has ended on the destination: \(words.isEmpty ? "\(error)" : words)"
        }
        guard let finalDigests, let images else { return nil }
        do {
            try await finalDigests.value
            ownedDigests = try await images.digests()
        } catch { return "The images on the destination cannot be read back: \(error)" }
        var wrong = await images.mismatches(proofs)
        for (name, digest) in release.digests where ownedDigests[name] != digest { wrong.append(name) }
        guard !wrong.isEmpty else { return nil }
        let names = Set(wrong).sorted().joined(separator: ", ")
        return
            "What the destination has of \(names) is not what the source sent: it was damaged on the way or on the disk"
    }

    private func connectMonitor() async throws -> QMPClient {
        if let monitor, monitor.isConnected { return monitor }
        // An earlier agent was connected, or the connection broke; QEMU has outlived it.
        guard let record else { throw GuestError("The record of the guest is gone") }
        let monitor = try await QMPClient.connect(to: agent.guests.agentMonitor(of: record), on: agent.loop)
        self.monitor = monitor
        return monitor
    }

    private func resumeGuest() async throws {
        guard var record else { throw ChannelError(.protocolViolation, "RELEASE for a guest that is not there") }
        let monitor = try await connectMonitor()
        await images?.release()
        try await run(monitor)
        runsHere = true
        record.released = nil
        try agent.guests.save(record)
        self.record = record
    }

    /// QEMU must have the whole guest before it may run.
    private func waitUntilLoaded(_ monitor: QMPClient) async throws {
        for _ in 0..<3000 {
            let state = try await monitor.migrationState()
            let status = try await monitor.status()
            if state.status == "completed", status == "paused" { return }
            if status == "running" { throw GuestError("The guest runs before it was released; this must not happen") }
            await agent.loop.sleep(for: .milliseconds(5))
        }
        throw GuestError("QEMU did not finish loading the guest within 15 s")
    }

    /// Resumes the guest. It belongs to this side whatever happens here, so a failure is repeated, not rolled back.
    private func run(_ monitor: QMPClient) async throws {
        var attempt = 0
        while true {
            do {
                if try await monitor.status() != "running" { try await monitor.resume() }
                _ = try? await monitor.execute(
                    "announce-self",
                    ["initial": 50, "max": 550, "rounds": 5, "step": 50]
                )
                return
            } catch let error as QMPError where error.code == .refused {
                attempt += 1
                log(.error, "Migration \(id): the guest belongs to this host, but QEMU does not resume it: \(error)")
                if attempt >= 20 { throw error }
                await agent.loop.sleep(for: .milliseconds(100 * attempt))
            }
        }
    }

    /// The guest belongs here, and QEMU could not be made to run it: that does not change who owns it.
    private func tryAgain() {
        Task(executorPreference: agent.loop) {
            await self.agent.loop.sleep(for: .seconds(5))
            await self.order.acquire()
            defer { self.order.release() }
            guard self.state == .owner else { return }
            do {
                try await self.own()
                if self.connections.isEmpty { self.finish() }
            } catch {
                self.log(.error, "Migration \(self.id): the guest belongs to this host and does not run: \(error)")
                if self.record?.process?.isRunning == true {
                    self.tryAgain()
                } else {
                    // Nothing can be resumed; the images are complete and the guest may be started here.
                    self.finish()
                }
            }
        }
    }

    /// The guest runs here. Whether the source knows is its own affair: it may ask again, and the journal answers.
    private func finish() {
        guard state == .owner else { return }
        state = .done
        unlink("\(directory)/incoming.json")
        unlink(proofsFile)
        unlink(incomingSocket)
        monitor?.close()
        monitor = nil
        images = nil
        guestLock = nil
    }

    // MARK: The way back

    /// The agent ends: what the source can still take back by itself is given up, everything else waits for the next
    /// agent with its QEMU and its images.
    func agentStops() async {
        absence?.cancel()
        guard state == .new || state == .offered else { return }
        let reason = "The destination agent was stopped"
        // A source that only lost the connection would wait for it.
        for connection in connections {
            try? await connection.channel.withDeadline(.seconds(1), for: "ABORT") {
                try await connection.send(.abort(reason))
            }
        }
        await giveUp(reason)
    }

    /// Ends the migration before the release and leaves nothing behind.
    func giveUp(_ reason: String) async {
        guard state == .new || state == .offered || state == .prepared else { return }
        let began = journal != nil
        state = .aborted
        absence?.cancel()
        finalDigests?.cancel()
        images?.stopDigests()
        _ = try? await finalDigests?.value
        await settling?.value
        if let journal, refusal == nil {
            do {
                try journal.append(.rolledBack(reason: reason))
                refusal = reason
            } catch { log(.error, "Migration \(id): \(error)") }
        }
        secrets = [:]
        for file in offer?.files ?? [] where file.path.hasPrefix("header:") && file.digest.allSatisfy(\.isHexDigit) {
            unlink("\(agent.configuration.imageDirectory)/.files/\(file.digest)")
        }
        if let shadow {
            self.shadow = nil
            await shadow.stop()
        }
        monitor?.close()
        monitor = nil
        if let offer, began {
            if hasStarted {
                // QEMU's process is recorded before its monitor answers.
                let known = (try? agent.guests.load(offer.guest)) ?? nil
                await (record?.process ?? known?.process)?.terminate()
                agent.guests.remove(offer.guest)
                if let previous { try? agent.guests.save(previous) }
            }
            await images?.delete()
            unlink("\(directory)/incoming.json")
            unlink(proofsFile)
            log(.info, "Migration \(id): gave up guest '\(offer.guest)': \(reason)")
        }
        images = nil
        guestLock = nil
    }

    // MARK: After a restart of the agent

    static func restore(_ id: String, agent: DestinationAgent) -> IncomingMigration? {
        let path = "\(agent.migrations.directory(of: id))/incoming.json"
        guard let bytes = try? DurableFile.read(path),
            let saved = JSONText.decode(Saved.self, from: bytes)
        else { return nil }
        let migration = IncomingMigration(id, peer: saved.peer, agent: agent)
        migration.offer = saved.offer
        migration.previous = saved.previous
        migration.isReady = saved.isReady ?? false
        migration.hasStarted = true
        return migration
    }

    /// Decides from the journal alone: nothing durable means that the source still owns the guest.
    func resume(_ records: [JournalRecord]) async {
        guard let offer else { return }
        do {
            guard try agent.migrations.latest(of: offer.guest) == id else {
                // A later migration has decided about this guest.
                unlink("\(directory)/incoming.json")
                return
            }
            guard let lock = try agent.migrations.lock(guest: offer.guest) else {
                log(.error, "Migration \(id): guest '\(offer.guest)' is locked by another process")
                return
            }
            guestLock = lock
            journal = try Journal(opening: agent.migrations.journal(of: id))
            record = try agent.guests.load(offer.guest)
            let images = makeImages(offer)
            self.images = images
            if let digests = records.ownerDigests {
                state = .owner
                ownedDigests = digests
                if record?.process?.isRunning == true {
                    try await own()
                    log(.info, "Migration \(id): took up guest '\(offer.guest)', which belongs to this host")
                } else {
                    log(
                        .warning,
                        "Guest '\(offer.guest)' belongs to this host and does not run; use 'crossdock guest start'"
                    )
                }
                finish()
            } else if records.contains(.prepared), !records.isRolledBack {
                state = .prepared
                for disk in offer.disks {
                    try images.adopt(disk, at: imagePath(disk, offer), export: exportName(disk))
                }
                if let bytes = try DurableFile.read(proofsFile),
                    let saved = JSONText.decode(Message.Prepared.self, from: bytes)
                {
                    (proofs, isFull) = (saved.proofs, saved.isFull)
                }
                takeFinalDigests(images)
                log(.warning, "Migration \(id): waiting for the source's word on guest '\(offer.guest)'")
            } else {
                state = .offered
                if isReady, !records.isRolledBack, await reopen(offer, images) {
                    waitForSource()
                    return
                }
                for disk in offer.disks where DurableFile.exists(imagePath(disk, offer)) {
                    try? images.adopt(disk, at: imagePath(disk, offer), export: exportName(disk))
                }
                for case .rolledBack(let reason) in records { refusal = reason }
                await giveUp("The destination agent ended before the guest was released")
            }
        } catch {
            log(.error, "Migration \(id): cannot be taken up: \(error)")
            if state == .owner { return tryAgain() }
            // A disk that is full may be emptied; until then nobody is told that there is no such migration.
            isStuck = true
            Task(executorPreference: agent.loop) {
                await self.agent.loop.sleep(for: .seconds(5))
                guard let records = try? Journal.read(self.agent.migrations.journal(of: self.id)) else { return }
                self.isStuck = false
                (self.journal, self.guestLock) = (nil, nil)
                await self.images?.forget()
                await self.resume(records)
            }
        }
    }

    /// Exports the images of an earlier agent again, so that the source can go on. QEMU is started when it is needed.
    private func reopen(_ offer: Message.Offer, _ images: IncomingImages) async -> Bool {
        do {
            for disk in offer.disks {
                try await images.reopen(disk, at: imagePath(disk, offer), export: exportName(disk), for: peer.name)
            }
            if let record, record.process?.isRunning == true { _ = try? await connectMonitor() }
            // Whether it has taken a part of a stream is not known.
            hasListened = true
            return true
        } catch {
            log(.warning, "Migration \(id): cannot go on: \(error)")
            await images.forget()
            return false
        }
    }
}
