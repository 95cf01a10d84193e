internal import CLinux
public import Emulator
internal import Glibc
public import IO
internal import Migration
public import NBD
public import TLS

/// The disks of one running guest as NBD exports, live or as of one moment.
///
/// QEMU shows them on a Unix socket that only this process reaches; whoever comes over the network talks to this process.
/// What a client does or leaves undone therefore never reaches the guest. The monitor is held only while something is
/// changed. Confined to a loop.
public final class GuestExport: @unchecked Sendable {
    // Unchecked: confined to the loop that it was opened on.

    /// What is exported, and how.
    public struct Options: Sendable {
        /// The disks by name; every disk when it is empty.
        public var disks: Set<String> = []
        /// Whether a moment is shown instead of the disks as they are.
        public var isSnapshot = false
        /// Whether clients may write, where the guest's device shares its disk.
        public var isWritable = false
        /// Where the scratch files of a snapshot are; nil for a place of their own that QEMU's user can reach.
        public var scratchDirectory: String?
        /// How long a write of the guest may wait for the scratch file, in seconds.
        public var timeout = 4
        /// How long file systems may stay frozen, in seconds.
        public var freezeLimit = 10
        /// How many bitmaps of earlier snapshots are kept.
        public var keptBitmaps = 4
        /// This program, for the watchdog.
        public var program: String
        /// Who may use an export, by its name.
        public var authorize: @Sendable (String) -> @Sendable (TLSPeer?) -> ExportAccess

        /// Makes options.
        public init(
            scratchDirectory: String?,
            program: String,
            authorize: @escaping @Sendable (String) -> @Sendable (TLSPeer?) -> ExportAccess
        ) {
            self.scratchDirectory = scratchDirectory
            self.program = program
            self.authorize = authorize
        }
    }

    /// The exports, named `GUEST/DISK`.
    public private(set) var exports: [Export] = []
    /// The bitmap that began with the snapshot: the name under which the next one offers what has changed since.
    public private(set) var bitmap: String?
    /// How long the guest was paused for the snapshot, in milliseconds.
    public private(set) var pause = 0.0
    /// How many file systems were frozen for it; nil without a guest agent.
    public private(set) var frozen: Int?
    /// What went wrong on the way without being fatal.
    public private(set) var warnings: [String] = []
    private let record: GuestRecord
    private let store: GuestStore
    private let loop: EventLoop
    private let loops: EventLoopGroup
    private var snapshot: FleecingSnapshot?
    private var directory = ""
    private var hasServer = false
    /// Whether a freeze was sent and no thaw answered.
    private var mayBeFrozen = false
    private var scratch = ""
    private var lock: FileLock?
    private var ids: [String] = []

    private init(_ record: GuestRecord, _ store: GuestStore, _ loop: EventLoop, _ loops: EventLoopGroup) {
        self.record = record
        self.store = store
        self.loop = loop
        self.loops = loops
    }

    private static let connections = 4

    /// Opens the disks of a guest.
    ///
    /// - Parameters:
    ///   - record: the guest.
    ///   - store: where it is recorded.
    ///   - options: what and how.
    ///   - loop: the caller's loop.
    ///   - loops: where the disks are read.
    /// - Throws: `GuestError`, `QMPError`, `FileError` or `ChannelError`; nothing is left in the guest then.
    public static func open(
        _ record: GuestRecord,
        _ store: GuestStore,
        _ options: Options,
        on loop: EventLoop,
        loops: EventLoopGroup
    ) async throws -> GuestExport {
        guard let process = record.process, process.isRunning else {
            if let released = record.released {
                throw GuestError(
                    "Guest '\(record.name)' is not here any more: it moved to \(released.destination); export it there"
                )
            }
            throw GuestError("Guest '\(record.name)' does not run; export its images with 'crossdock nbd serve'")
        }
        guard let lock = try FileLock(store.exportLock(of: record.name)) else {
            throw GuestError("The disks of guest '\(record.name)' are exported already; end that export first")
        }
        let export = GuestExport(record, store, loop, loops)
        export.lock = lock
        let monitor = try await store.connect(to: record, on: loop)
        defer { monitor.close() }
        do {
            try await export.show(monitor, process, options)
        } catch {
            await export.takeBack(monitor)
            throw error
        }
        return export
    }

    private func show(_ monitor: QMPClient, _ process: EmulatorProcess, _ options: Options) async throws {
        try await Self.clear(record, store, monitor, scratch: options.scratchDirectory)
        let all = try await monitor.disks()
        let wanted = all.filter {
            options.disks.isEmpty ? !$0.isReadOnly || $0.isLocal : options.disks.contains($0.name)
        }
        let missing = options.disks.subtracting(wanted.map(\.name)).sorted()
        guard missing.isEmpty else {
            throw GuestError(
                "Guest '\(record.name)' has no disk '\(missing[0])'; it has \(all.map(\.name).joined(separator: ", "))"
            )
        }
        guard !wanted.isEmpty else { throw GuestError("Guest '\(record.name)' has no disks") }
        for disk in wanted where !monitor.isAtLeast(9, 1) {
            // There a client that leaves such an export ends QEMU, and the guest with it (nbd_blockdev_client_closed).
            guard let thread = try await monitor.ioThread(of: disk.device) else { continue }
            throw GuestError(
                "The disk '\(disk.name)' of guest '\(record.name)' is served by the I/O thread "
                    + "\(thread.split(separator: "/").last ?? ""), and QEMU \(monitor.version) aborts when a reader of such a disk "
                    + "leaves; choose other disks with --disk, or use QEMU 9.1"
            )
        }
        // QEMU makes its socket as its own user.
        var status = stat()
        let owner = stat("/proc/\(process.pid)", &status) == 0 ? status.st_uid : geteuid()
        directory = try makeDirectory(owner: owner)
        if options.isSnapshot {
            if let wanted = options.scratchDirectory {
                if let confinement = record.confinement, let own = ownDirectory,
                    ![own, confinement.imageDirectory].contains(where: {
                        DurableFile.resolve(wanted, in: "/").hasPrefix($0 + "/")
                    })
                {
                    throw GuestError(
                        "Guest '\(record.name)' is confined, and its QEMU reaches no scratch files in \(wanted): leave out "
                            + "--scratch-dir, or name a directory below \(confinement.imageDirectory) that belongs to the guest's user"
                    )
                }
                scratch = wanted
            } else if let own = ownDirectory {
                scratch = "\(own)/scratch"
                try HandOver.makeDirectory(scratch, for: owner)
            } else {
                // The state directory is not for others.
                scratch =
                    owner == geteuid()
                    ? store.scratchDirectory : try Self.makeDirectory(owner: owner, in: "/var/tmp")
            }
        }
        // Before anything is in the guest, so that the next export knows what to look for.
        try DurableFile.write(Array("\(directory)\n\(scratch)".utf8), to: store.exportRecord(of: record.name))
        if options.isSnapshot { try await takeSnapshot(of: wanted.filter { !$0.isReadOnly }, monitor, owner, options) }
        do {
            try await monitor.startNBDServer(socket: "\(directory)/nbd.sock", connections: 0)
        } catch let error as QMPError where error.code == .refused {
            throw GuestError(
                "QEMU of guest '\(record.name)' has one NBD server, which something else uses already; it was left alone "
                    + "(\(error.message))"
            )
        }
        hasServer = true
        for (index, disk) in wanted.enumerated() {
            let shown = snapshot?.disks.first { $0.disk.node == disk.node }
            let id = "xde-\(index)"
            let name = "\(record.name)/\(disk.name)"
            let bitmaps = shown?.bitmaps ?? []
            let isWritable = options.isWritable && !options.isSnapshot && !disk.isReadOnly
            try await monitor.addNBDExport(
                id,
                node: shown?.node ?? disk.node,
                name: id,
                isWritable: isWritable,
                bitmaps: bitmaps
            )
            ids.append(id)
            let contexts =
                [MetaContext.allocation, MetaContext.allocationDepth]
                + bitmaps.map { MetaContext.dirtyBitmapPrefix + $0.name }
            var client = NBDClientOptions(export: id, contexts: contexts)
            if shown != nil { client.explain = Self.explanation(disk.name, of: record.name, scratch: scratch) }
            let remote = try await ClientBackEnd.open(
                .unix(path: "\(directory)/nbd.sock"),
                client,
                connections: max(loops.loops.count, Self.connections),
                loops: loops
            )
            let kind = shown == nil ? "as it is" : "as of \(bitmap ?? "")"
            exports.append(
                Export(
                    name: name,
                    summary: "\(disk.name) of guest \(record.name), \(kind)",
                    backEnd: remote,
                    authorize: options.authorize(name)
                )
            )
        }
    }

    /// What the readers of a snapshot are told when it cannot be read: QEMU only says that it may not be.
    private static func explanation(
        _ disk: String,
        of guest: String,
        scratch: String
    ) -> @Sendable (NBDError) -> NBDError {
        { error in
            // QEMU tries a page more than there is room for.
            let isFull = xd_free_bytes(scratch) < 1 << 20
            let cause =
                isFull
                ? "its scratch directory is full, which --scratch-dir of 'crossdock export' sets"
                : "its scratch file was full, or too slow for what the guest writes (--scratch-dir and --cbw-timeout of 'crossdock export')"
            return NBDError(
                error.number,
                "The snapshot of '\(disk)' of guest '\(guest)' has broken, and this backup has to be repeated: \(cause). QEMU: \(error.message)"
            )
        }
    }

    /// Takes out what an export of a guest that was killed has left. The caller has the export's lock.
    ///
    /// - Parameters:
    ///   - record: the guest.
    ///   - store: where it is recorded.
    ///   - monitor: its monitor.
    ///   - scratch: where its scratch files may be, besides the usual place.
    static func clear(
        _ record: GuestRecord,
        _ store: GuestStore,
        _ monitor: QMPClient,
        scratch: String? = nil
    ) async throws {
        let path = store.exportRecord(of: record.name)
        let lines = ((try? DurableFile.read(path)) ?? nil).map {
            String(decoding: $0, as: UTF8.self).split(separator: "\n", omittingEmptySubsequences: false).map(
                String.init
            )
        }
        let noted = lines.flatMap { $0.count > 1 && !$0[1].isEmpty ? $0[1] : nil }
        let directories = [store.scratchDirectory] + [scratch, noted].compactMap { $0 }
        try await FleecingSnapshot.clear(monitor, label: record.name, directories: directories)
        guard let directory = lines?.first else { return }
        // Whoever answers at that path is the server that was started for us: nobody else knows the path.
        let probe = try? await SocketChannel.connect(to: .unix(path: "\(directory)/nbd.sock"), on: monitor.loop)
        probe?.close()
        if probe != nil, try await monitor.blockExports().isEmpty { try await monitor.stopNBDServer() }
        remove(directory, of: record, store)
        if let noted, noted.hasPrefix("/var/tmp/crossdock-") { rmdir(noted) }
        unlink(path)
    }

    /// The only directory in which a confined guest makes files; nil for a guest that is not confined.
    private var ownDirectory: String? {
        record.confinement?.isInForce == true ? store.runDirectory(of: record.name) : nil
    }

    /// A directory in which QEMU can make its socket.
    private func makeDirectory(owner: UInt32) throws -> String {
        guard let own = ownDirectory else { return try Self.makeDirectory(owner: owner, in: "/tmp") }
        let path = "\(own)/x"
        try HandOver.makeDirectory(path, for: owner)
        unlink("\(path)/nbd.sock")
        return path
    }

    /// The directory belongs to QEMU's user: only what is known to be in it is removed.
    private static func remove(_ directory: String, of record: GuestRecord, _ store: GuestStore) {
        guard directory.hasPrefix("/tmp/crossdock-") || directory == "\(store.runDirectory(of: record.name))/x" else {
            return
        }
        unlink("\(directory)/nbd.sock")
        rmdir(directory)
    }

    private static func makeDirectory(owner: UInt32, in parent: String) throws -> String {
        let path = try DurableFile.makePrivateDirectory(in: parent)
        if owner != geteuid(), chown(path, owner, gid_t.max) != 0 {
            let number = errno
            rmdir(path)
            throw FileError.system("give \(path) to the user that QEMU runs as", number)
        }
        return path
    }

    /// Freezes what can be frozen, takes the snapshot, and thaws again.
    private func takeSnapshot(
        of disks: [GuestDisk],
        _ monitor: QMPClient,
        _ owner: UInt32,
        _ options: Options
    ) async throws {
        var settings = FleecingSnapshot.Options(scratchDirectory: scratch, label: record.name, owner: owner)
        settings.timeout = options.timeout
        settings.keptBitmaps = options.keptBitmaps
        let prepared = try await FleecingSnapshot.prepare(of: disks, monitor, settings)
        snapshot = prepared
        let socket = try await monitor.guestAgentSocket().map {
            DurableFile.resolve($0, in: record.commandLine.directory)
        }
        let thawing = try socket.map {
            try SnapshotWatchdog(agent: $0, monitor: nil, seconds: options.freezeLimit + 15, program: options.program)
        }
        var agent = try await freeze(socket, options)
        var running: SnapshotWatchdog?
        let path = store.agentMonitor(of: record)
        let result: Result<Void, any Error>
        do {
            result = .success(
                try await prepared.take(monitor) {
                    running = try SnapshotWatchdog(agent: nil, monitor: path, seconds: 15, program: options.program)
                }
            )
        } catch { result = .failure(error) }
        if let socket, mayBeFrozen {
            let thawed = await thaw(socket, &agent)
            if thawed == 0, (frozen ?? 0) > 0 {
                // They thawed by themselves, or through something else, perhaps before the moment.
                warnings.append(
                    "The file systems of guest '\(record.name)' were not frozen any more when the snapshot was taken"
                )
                frozen = nil
            }
            if thawed != nil {
                mayBeFrozen = false
                thawing?.dismiss()
            }
        } else {
            thawing?.dismiss()
        }
        agent?.close()
        if (try? await monitor.status()) != "paused" || running == nil { running?.dismiss() }
        try result.get()
        bitmap = prepared.name
        pause = prepared.pause
    }

    /// Freezes what can be frozen; what cannot is a warning.
    private func freeze(_ socket: String?, _ options: Options) async throws -> GuestAgent? {
        guard let socket else { return nil }
        do {
            let agent = try await GuestAgent.connect(to: socket, on: loop)
            do {
                mayBeFrozen = true
                frozen = try await agent.freeze(timeout: .seconds(options.freezeLimit))
                return agent
            } catch {
                // It may be under way all the same.
                agent.close()
                var none: GuestAgent?
                if await thaw(socket, &none) != nil { mayBeFrozen = false }
                none?.close()
                throw error
            }
        } catch {
            warnings.append("The file systems of guest '\(record.name)' were not frozen: \(error)")
            return nil
        }
    }

    /// Thaws, over a new connection when the old one is of no use any more.
    ///
    /// - Returns: how many file systems were frozen; nil when nobody answers, which leaves it to the watchdog.
    private func thaw(_ socket: String, _ agent: inout GuestAgent?) async -> Int? {
        for _ in 0..<3 {
            if let current = agent, let count = try? await current.thaw() { return count }
            agent?.close()
            agent = try? await GuestAgent.connect(to: socket, on: loop)
        }
        warnings.append("The file systems of guest '\(record.name)' could not be thawed yet; a watchdog goes on trying")
        return nil
    }

    /// Whether the guest's QEMU still runs.
    public var isRunning: Bool { record.process?.isRunning ?? false }

    /// Ends the exports and takes everything out of the guest again, but the bitmaps.
    ///
    /// - Returns: what could not be done, or nil.
    public func close() async -> String? {
        for export in exports { await export.close() }
        for export in exports { await export.backEnd.close() }
        exports = []
        defer { lock = nil }
        guard isRunning else {
            discardFiles()
            return nil
        }
        do {
            let monitor = try await store.connect(to: record, on: loop)
            defer { monitor.close() }
            let before = warnings.count
            await takeBack(monitor)
            return warnings.count > before ? warnings.last : nil
        } catch {
            return
                "The export's nodes stay in guest '\(record.name)' until the next export or its end, since its monitor does not "
                + "answer: \(error)"
        }
    }

    private func takeBack(_ monitor: QMPClient) async {
        for export in exports { await export.backEnd.close() }
        exports = []
        for id in ids { _ = try? await monitor.removeNBDExport(id) }
        ids = []
        // Somebody may have put exports of their own on it meanwhile.
        if hasServer, (try? await monitor.blockExports().isEmpty) == true { _ = try? await monitor.stopNBDServer() }
        hasServer = false
        let left = await snapshot?.remove(monitor) ?? []
        if !left.isEmpty {
            warnings.append("QEMU does not let go of \(left.joined(separator: ", ")); the next export tries again")
        }
        snapshot = nil
        discardFiles()
    }

    private func discardFiles() {
        snapshot?.discard()
        if scratch.hasPrefix("/var/tmp/crossdock-") { rmdir(scratch) }
        if !directory.isEmpty { Self.remove(directory, of: record, store) }
        directory = ""
        unlink(store.exportRecord(of: record.name))
    }
}
