import ArgumentParser
import CLinux
import Emulator
import Glibc
import IO
import Migration
import NBD
import TLS

struct NBDServeCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "serve",
        abstract: "Serves images and devices as NBD exports: qemu-nbd's job.",
        discussion: """
            One export takes qemu-nbd's options:

              crossdock nbd serve --object tls-creds-x509,id=tls0,endpoint=server,dir=DIR --tls-creds tls0 -t -x web1 web1.raw

            Several take one --export each, with its own access: authz and read-only-authz are the ids of authz objects that say who \
            may write and who may read.

              crossdock nbd serve -t --export name=web1,file=web1.raw,authz=admins --export name=db,file=db.qcow2,format=qcow2

            Without --tls-creds the server speaks clear text, as qemu-nbd does. Raw images and devices are served directly, other formats through qemu-storage-daemon. A socket that systemd has opened \
            is used instead of --port, --bind and --socket. Ends when the last client has gone, unless -t is given, and on \
            SIGTERM: what is under way is finished, and everything new is refused. SIGHUP loads the credentials again.
            """
    )

    @OptionGroup var common: CommonOptions
    @OptionGroup var security: NBDServerSecurity
    @OptionGroup var network: NBDListenOptions
    @OptionGroup var image: NBDImageOptions
    @OptionGroup var foreign: ForeignServerOptions

    @Option(
        name: [.customShort("e", allowingJoined: true), .long],
        help: "How many clients at once, one more waits two seconds for a place; 0 for no bound but the server's own."
    )
    var shared = 0
    @Flag(name: [.customShort("t"), .long], help: "Go on when the last client has gone.")
    var persistent = false
    @Flag(
        name: [.customShort("v"), .long],
        help: "With --fork: keep standard error open. What goes wrong is told there in any case."
    )
    var verbose = false
    @Flag(help: "Return when the server is running; it goes on in the background.")
    var fork = false
    @Option(help: ArgumentHelp("Where to write the process's number.", valueName: "file"))
    var pidFile: String?
    @Option(help: "Seconds that a client may take from connecting to using an export.")
    var handshakeLimit = 10
    @Option(help: .hidden)
    var readyFD: Int32?
    @Argument(help: "An image, a device, or with --image-opts its description.")
    var file: String?

    func validate() throws {
        guard (0...100_000).contains(shared) else { throw ValidationError("--shared is a number from 0 to 100000.") }
        guard (1...3600).contains(handshakeLimit) else {
            throw ValidationError("--handshake-limit is a number from 1 to 3600.")
        }
        let sources = [file != nil, image.memory != nil, !image.exports.isEmpty].filter { $0 }.count
        guard sources == 1 else {
            throw ValidationError("Give one of these: an image, --memory SIZE, or --export for each of several images.")
        }
        if security.credentials.tlsCreds == nil, image.exports.contains(where: { $0.contains("tls=on") }) {
            throw ValidationError("An --export with tls=on needs --tls-creds.")
        }
        guard image.exports.isEmpty || image.exportName == nil && image.description == nil && image.format == nil else {
            throw ValidationError("With --export the name, description and format belong into it.")
        }
    }

    func run() async throws {
        if fork { return try await failing { try runInBackground() } }
        let events = AsyncStream<Event>.makeStream()
        SignalWatcher.start([SIGINT, SIGTERM, SIGHUP]) { events.continuation.yield(.signal($0)) }
        try await failing {
            xd_raise_descriptor_limit()
            let objects = try security.credentials.store()
            let credentials = try security.serverCredentials(from: objects)
            if let authz = security.tlsAuthz { _ = try objects.authorizer(authz) }
            let loops = EventLoopGroup(name: "nbd")
            let exports = ExportTable()
            let served = try await image.open(file: file, objects: objects, isExclusive: shared == 1, loops: loops)
            for export in served.exports { exports.add(export) }
            var limits = NBDServer.Limits()
            if shared > 0 { limits.connections = shared }
            limits.handshake = .seconds(handshakeLimit)
            // Half of the handshake at most, so that who gets no place is told why.
            limits.patience = min(.seconds(2), limits.handshake / 2)
            let endsWithLast = !persistent
            let server = NBDServer(
                exports: exports,
                credentials: credentials,
                mode: security.tls.mode,
                access: security.tlsAuthz.map { AccessControl(objects: objects, authorization: $0) },
                loops: loops,
                limits: limits,
                log: { [common] in common.log(.warning, $0) },
                note: { [common] in common.log(.debug, $0) },
                onDisconnect: { if endsWithLast, $0 == 0 { events.continuation.yield(.lastClientLeft) } }
            )
            let result: Result<Event, any Error>
            do {
                result = .success(try await serve(server, loops, events.stream, objects))
            } catch {
                result = .failure(error)
            }
            // Somebody who says it twice does not want to wait. Who says it once to a server that ends by itself says nothing new.
            let impatient = Task {
                var isTold = (try? result.get())?.isOrder ?? true
                for await event in events.stream where event.isOrder {
                    if isTold { _exit(1) }
                    isTold = true
                }
            }
            await server.drain()
            for export in served.exports { await export.backEnd.close() }
            for daemon in served.daemons { await daemon.stop() }
            if let pidFile { unlink(pidFile) }
            impatient.cancel()
            _ = try result.get()
        }
    }

    /// What a server that runs can hear.
    private enum Event: Equatable, Sendable {
        case signal(Int32)
        case lastClientLeft
        case endOfInput

        /// Whether somebody wants the server to end.
        var isOrder: Bool {
            if case .signal(let number) = self { number != SIGHUP } else { false }
        }
    }

    /// Listens and serves until something ends it, and says what.
    private func serve(
        _ server: NBDServer,
        _ loops: EventLoopGroup,
        _ events: AsyncStream<Event>,
        _ objects: ObjectStore
    ) async throws -> Event {
        let loop = loops.loops[0]
        if network.stdio {
            try announce(["standard input"])
            return try await withThrowingTaskGroup(of: Event.self) { group in
                group.addTask {
                    try await loop.run { try await server.serve(DescriptorChannel.standard(on: loop)) }
                    return .endOfInput
                }
                group.addTask {
                    for await event in events where event != .signal(SIGHUP) {
                        await server.drain()
                        return event
                    }
                    return .endOfInput
                }
                let first = try await group.next() ?? .endOfInput
                group.cancelAll()
                return first
            }
        }
        let listener = try await network.listen(on: loop)
        defer { listener.abort() }
        for each in listener.listeners {
            Task(executorPreference: loop) { await server.serve(each) }
        }
        try announce(listener.addresses.map(\.description))
        for await event in events {
            guard event == .signal(SIGHUP) else { return event }
            let result = try objects.reload()
            for id in result.reloaded { common.log(.info, "reloaded '\(id)'") }
            for failure in result.failures { common.log(.error, "\(failure)") }
        }
        return .endOfInput
    }

    /// Tells whoever waits that the server is running.
    private func announce(_ addresses: [String]) throws {
        if let pidFile { try DurableFile.write(Array("\(getpid())\n".utf8), to: pidFile, mode: 0o644) }
        guard let readyFD else {
            // Standard output belongs to whoever runs the server for a command of theirs.
            if !network.stdio { printError("crossdock nbd serve: listening on \(addresses.joined(separator: ", "))") }
            return
        }
        let null = Glibc.open("/dev/null", O_RDWR)
        for descriptor in 0...(verbose ? 1 : 2) { dup2(null, Int32(descriptor)) }
        close(null)
        var byte: UInt8 = 1
        write(readyFD, &byte, 1)
        close(readyFD)
    }

    /// Starts this program again in the background, and waits until it serves.
    private func runInBackground() throws {
        var ends: [Int32] = [0, 0]
        guard xd_pipe(&ends) == 0 else { throw ChannelError.system("make a pipe", errno) }
        // Behind a "--" everything is a file.
        let words = CommandLine.arguments.dropFirst()
        let options = words.prefix { $0 != "--" }
        let given = options.filter { $0 != "--fork" } + ["--ready-fd", "\(ends[1])"] + words.dropFirst(options.count)
        var argv = (["/proc/self/exe"] + given).map { strdup($0) } + [nil]
        let null = Glibc.open("/dev/null", O_RDONLY | O_CLOEXEC)
        // Its descriptors 0 to 2 are ours until it is ready, so that its complaints are seen.
        let pid = xd_spawn_detached(&argv, environ, nil, null, 1, 2, [ends[1]], 1, nil, nil)
        let number = errno
        for pointer in argv { free(pointer) }
        close(ends[1])
        guard pid > 0 else { throw ChannelError.system("start the server", number) }
        var byte: UInt8 = 0
        while true {
            let count = read(ends[0], &byte, 1)
            if count < 0, errno == EINTR { continue }
            // It has printed why.
            guard count == 1 else { throw ExitCode(1) }
            return
        }
    }
}
