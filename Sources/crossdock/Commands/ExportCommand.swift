import ArgumentParser
import CLinux
import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import NBD
import Source
import TLS

struct ExportCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "export",
        abstract: "Serves the disks of running guests as NBD exports over TLS.",
        discussion: """
            The exports are named GUEST/DISK. Without --snapshot they show the disks as they are; with it a moment that stays, and \
            that starts a dirty bitmap: the next snapshot offers what has changed since as the metadata context \
            qemu:dirty-bitmap:NAME. Ends on SIGTERM or SIGINT, or when the guests have ended; the guests go on. SIGHUP loads the \
            credentials again.
            """
    )

    @Argument(help: "The guests' names; see 'crossdock guest list'.")
    var guests: [String]

    @OptionGroup var common: CommonOptions
    @OptionGroup var security: CredentialOptions

    @Option(
        help: ArgumentHelp(
            "Where to listen; port 0 lets the system choose. Without it on port \(NBDWire.port), or, where that is taken, on one that is "
                + "free.",
            valueName: "host:port"
        )
    )
    var listen: String?

    @Option(
        help: ArgumentHelp(
            "Export this disk only; may be given several times. Every disk otherwise.",
            valueName: "name"
        )
    )
    var disk: [String] = []

    @Flag(help: "Show one moment of all disks instead of the disks as they are.")
    var snapshot = false

    @Flag(help: "Let clients write, where the guest's device shares its disk (share-rw=on).")
    var writable = false

    @Option(
        help: ArgumentHelp(
            "Who may use an export: the id of an authz object, for all exports, for a guest's (web1=ID) or for one (web1/disk0=ID).",
            valueName: "[export=]id"
        )
    )
    var tlsAuthz: [String] = []

    @Option(
        help: ArgumentHelp(
            "Where a snapshot keeps what the guest overwrites; STATE-DIR/scratch by default.",
            valueName: "dir"
        )
    )
    var scratchDir: String?

    @Option(
        help: ArgumentHelp(
            "How long a write of the guest waits for the scratch file before the snapshot breaks.",
            valueName: "s"
        )
    )
    var cbwTimeout: Int = 4

    @Option(help: ArgumentHelp("How long the guest's file systems may stay frozen.", valueName: "s"))
    var freezeLimit: Int = 10

    @Option(help: ArgumentHelp("How many dirty bitmaps of earlier snapshots are kept in a guest.", valueName: "n"))
    var keepBitmaps: Int = 4

    func validate() throws {
        guard !guests.isEmpty else { throw ValidationError("Name a guest.") }
        guard Set(guests).count == guests.count else { throw ValidationError("A guest is named twice.") }
        guard (1...3600).contains(cbwTimeout) else { throw ValidationError("--cbw-timeout takes 1 to 3600") }
        guard (1...600).contains(freezeLimit) else { throw ValidationError("--freeze-limit takes 1 to 600") }
        guard (1...64).contains(keepBitmaps) else { throw ValidationError("--keep-bitmaps takes 1 to 64") }
        if snapshot, writable { throw ValidationError("A snapshot cannot be written; leave --writable out.") }
    }

    func run() async throws {
        let signals = AsyncStream<Int32>.makeStream()
        SignalWatcher.start([SIGINT, SIGTERM, SIGHUP]) { signals.continuation.yield($0) }
        try await failing {
            try common.checkAccess(forWriting: true)
            xd_raise_descriptor_limit()
            let objects = try security.store()
            let credentials = try security.credentials(.server, from: objects, user: "the export")
            let records = try guests.map { name in
                guard let record = try common.guests.load(name) else {
                    throw common.guests.unknown(name)
                }
                if let sentence = common.migrations.frozenSentence(of: record) { throw GuestError(sentence) }
                return record
            }
            var options = GuestExport.Options(
                scratchDirectory: scratchDir.map { DurableFile.resolve($0, in: currentDirectory) },
                program: DurableFile.resolve("/proc/self/exe", in: "/"),
                authorize: try authorization(objects, credentials)
            )
            options.disks = Set(disk)
            options.isSnapshot = snapshot
            options.isWritable = writable
            options.timeout = cbwTimeout
            options.freezeLimit = freezeLimit
            options.keptBitmaps = keepBitmaps
            // A suspended export would hold up its guests.
            for number in [SIGTSTP, SIGTTIN, SIGTTOU] { Glibc.signal(number, SIG_IGN) }
            let loops = EventLoopGroup(name: "nbd")
            let control = EventLoop(name: "control")
            let heartbeat = try Heartbeat(loops, program: options.program)
            defer { heartbeat.end() }
            var open: [GuestExport] = []
            let result: Result<Void, any Error>
            do {
                let store = common.guests
                // The address first: nothing is done to a guest for a port that is taken.
                let loop = loops.loops[0]
                let listener = try await listener(on: loop)
                for record in records {
                    guard let lock = try common.migrations.lock(guest: record.name) else {
                        throw MigrationError(.busy, "Guest '\(record.name)' is being migrated; see 'crossdock status'")
                    }
                    defer { withExtendedLifetime(lock) {} }
                    let options = options
                    open.append(
                        try await control.run {
                            try await GuestExport.open(record, store, options, on: control, loops: loops)
                        }
                    )
                }
                try await serve(open, listener, credentials, loops, control, signals.stream, objects)
                result = .success(())
            } catch {
                result = .failure(error)
            }
            for export in open {
                if let warning = try await control.run({ await export.close() }) { common.log(.warning, warning) }
            }
            try result.get()
        }
    }

    private func serve(
        _ open: [GuestExport],
        _ listener: Listener,
        _ credentials: any TLSCredentials,
        _ loops: EventLoopGroup,
        _ control: EventLoop,
        _ signals: AsyncStream<Int32>,
        _ objects: ObjectStore
    ) async throws {
        let exports = ExportTable()
        let served = try await control.run { open.map(\.exports) }
        for export in served.flatMap({ $0 }) { exports.add(export) }
        let names = Set(served.flatMap { $0 }.map(\.name)).union(guests)
        for rule in tlsAuthz where rule.contains("=") {
            let name = String(rule.prefix { $0 != "=" })
            guard names.contains(name) else {
                throw GuestError(
                    "There is no export '\(name)' for --tls-authz \(rule); there are \(names.sorted().joined(separator: ", "))"
                )
            }
        }
        var limits = NBDServer.Limits()
        // Each connection may have requests in memory; the guests are on the same host.
        limits.connections = 128
        let server = NBDServer(
            exports: exports,
            credentials: credentials,
            mode: .required,
            loops: loops,
            limits: limits,
            log: { [common] in common.log(.warning, $0) },
            note: { [common] in common.log(.debug, $0) }
        )
        let loop = loops.loops[0]
        Task(executorPreference: loop) { await server.serve(listener) }
        let told = try await control.run {
            open.map { ($0.warnings, $0.bitmap, $0.pause, $0.frozen) }
        }
        for (index, (warnings, bitmap, pause, frozen)) in told.enumerated() {
            for warning in warnings { common.log(.warning, warning) }
            guard let bitmap else { continue }
            let frozenText = frozen.map { ", \($0) file systems frozen" } ?? ""
            output(
                "crossdock export: snapshot \(bitmap) of guest '\(guests[index])', paused for \((pause * 10).rounded() / 10) ms"
                    + "\(frozenText)\n"
            )
        }
        for export in served.flatMap({ $0 }) {
            output("crossdock export: \(export.name), \(ProgressRenderer.bytes(Double(export.backEnd.size)))\n")
        }
        output("crossdock export: listening on \(listener.address)\n")
        // Guests end on their own; a server without any has nothing left to do.
        let watcher = Task(executorPreference: control) {
            while !Task.isCancelled {
                if !open.contains(where: \.isRunning) {
                    common.log(
                        .warning,
                        "Every guest has ended (\(guests.joined(separator: ", "))); so does their export"
                    )
                    return kill(getpid(), SIGTERM)
                }
                await control.sleep(for: .milliseconds(500))
            }
            return 0
        }
        for await signal in signals {
            guard signal == SIGHUP else { break }
            let result = try objects.reload()
            for id in result.reloaded { common.log(.info, "reloaded '\(id)'") }
            for failure in result.failures { common.log(.error, "\(failure)") }
        }
        watcher.cancel()
        let impatient = Task { for await signal in signals where signal != SIGHUP { _exit(1) } }
        try await loop.run { listener.close() }
        await server.drain()
        impatient.cancel()
    }

    /// Where clients connect. A destination agent has the usual port for itself.
    private func listener(on loop: EventLoop) async throws -> Listener {
        let address = try SocketAddress(parsing: listen ?? ":\(NBDWire.port)", defaultPort: NBDWire.port)
        do { return try await loop.run { try await Listener.listen(on: address, loop: loop) } } catch let error
            as ChannelError where error.number == EADDRINUSE && listen == nil
        {
            let free = address.with(port: 0)
            let listener = try await loop.run { try await Listener.listen(on: free, loop: loop) }
            printError(
                "crossdock: port \(NBDWire.port) is taken, by a destination agent or another server; the export is on port "
                    + "\(listener.address.port ?? 0), and --listen chooses another one"
            )
            return listener
        }
    }

    /// Who may use which export.
    private func authorization(
        _ objects: ObjectStore,
        _ credentials: any TLSCredentials
    ) throws -> @Sendable (String) -> @Sendable (TLSPeer?) -> ExportAccess {
        var rules: [(name: String, access: AccessControl)] = []
        for text in tlsAuthz {
            let parts = text.split(separator: "=", maxSplits: 1).map(String.init)
            let (name, id) = parts.count == 2 ? (parts[0], parts[1]) : ("", text)
            _ = try objects.authorizer(id)
            guard !rules.contains(where: { $0.name == name }) else {
                throw ValidationError("--tls-authz is given twice for \(name.isEmpty ? "all exports" : "'\(name)'")")
            }
            rules.append((name, AccessControl(objects: objects, authorization: id)))
        }
        if rules.isEmpty, !credentials.verifiesPeer {
            throw CredentialError(
                "The credentials '\(credentials.id)' do not verify who connects; use verify-peer=on or tls-creds-psk, since the "
                    + "disks of guests are not for everybody"
            )
        }
        let writable = writable
        let all = rules
        return { name in
            let guest = String(name.prefix { $0 != "/" })
            let mine = all.filter { $0.name.isEmpty || $0.name == guest || $0.name == name }
            // The most particular rule counts.
            let rule = mine.max { $0.name.count < $1.name.count }
            return { peer in
                guard let peer else { return .denied("It is only there within TLS") }
                do {
                    // With rules for some, the others are nobody's.
                    guard let rule else {
                        return all.isEmpty
                            ? (writable ? .readWrite : .readOnly) : .denied("No rule lets anybody use it")
                    }
                    try rule.access.check(peer)
                    return writable ? .readWrite : .readOnly
                } catch { return .denied("\(error)") }
            }
        }
    }
}
