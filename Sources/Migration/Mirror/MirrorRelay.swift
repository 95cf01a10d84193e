public import IO
public import NBD
internal import TLS

/// Carries one disk: QEMU mirrors into a Unix socket here, the relay sends it on over several TLS connections.
///
/// The socket's path belongs to this relay alone and is never listened on again: a successor could not know which
/// writes its predecessor had acknowledged early.
public final class MirrorRelay: @unchecked Sendable {
    // Unchecked: set up once; the rest is confined to `loop`.

    /// Where the relay and its connections live.
    public let loop: EventLoop
    /// The Unix socket for QEMU.
    public let socket: String
    /// What the relay has moved.
    public var counters: MirrorCounters { disk.counters }
    /// The version and cipher of its connections.
    public let tls: (version: String, cipher: String)
    /// How many connections it has.
    public var connections: Int { counters.connections }
    private let listener: Listener
    private let disk: MirrorBackEnd
    private let server: NBDServer
    private let export: Export
    /// The only process that may connect; nil for any of this user's.
    private let client: Int32?
    private var serving: Task<Void, Never>?

    private init(
        loop: EventLoop,
        listener: Listener,
        socket: String,
        disk: MirrorBackEnd,
        connections: [NBDConnection],
        export: String,
        client: Int32?
    ) {
        self.loop = loop
        self.client = client
        self.listener = listener
        self.socket = socket
        self.disk = disk
        tls = (connections[0].tls?.version ?? "none", connections[0].tls?.cipher ?? "none")
        let exports = ExportTable()
        self.export = Export(name: export, backEnd: disk)
        exports.add(self.export)
        server = NBDServer(exports: exports, credentials: nil, loops: EventLoopGroup(sharing: loop))
    }

    /// Connects to the destination's export and listens for QEMU.
    ///
    /// - Parameters:
    ///   - socket: the path of the Unix socket.
    ///   - address: the destination's NBD server.
    ///   - options: the export and the credentials.
    ///   - connections: how many connections to open; one if the server cannot keep several consistent.
    ///   - connectionsAtMost: how many there may be, if more carry more on a long line.
    ///   - size: what the disk's size must be.
    ///   - client: the only process that may connect to the socket; nil for any of this user's.
    ///   - endurance: what it bears; nil for a mirror that ends with the first lost connection.
    ///   - dialled: connections to the server that were begun already, on the loop, with the same options but for the export.
    ///   - isSeeded: whether the destination has an image already, of which `followTable` will tell.
    ///   - loop: where it all lives.
    ///   - onOutage: is told on the loop when the destination cannot be reached or has no space, with the reason, and with nil
    ///     when that is over.
    ///   - onFailure: is told once on the loop when the relay fails for good.
    public static func start(
        socket: String,
        to address: SocketAddress,
        options: NBDClientOptions,
        connections count: Int,
        connectionsAtMost: Int = 0,
        size: UInt64,
        client: Int32? = nil,
        endurance: MirrorEndurance? = MirrorEndurance(),
        dialled: [DialledConnection] = [],
        isSeeded: Bool = false,
        on loop: EventLoop,
        onOutage: @escaping @Sendable (String?) -> Void = { _ in },
        onFailure: @escaping @Sendable (String) -> Void = { _ in }
    ) async throws -> MirrorRelay {
        let options = bounded(options)
        return try await loop.run {
            var target = MirrorTarget(
                address: address,
                options: options,
                connections: count,
                reconnects: endurance != nil,
                isFenced: endurance?.isFenced ?? false
            )
            let connections = try await target.connect(on: loop, dialled: dialled)
            do {
                guard connections[0].size == size else {
                    throw MigrationError(
                        .failed,
                        "The export '\(options.export)' has \(connections[0].size) bytes instead of \(size)"
                    )
                }
                let listener = try await Listener.listen(on: .unix(path: socket), loop: loop)
                try SocketOwner.give(socket, to: client)
                let disk = MirrorBackEnd(
                    connections: connections,
                    to: target,
                    endurance: endurance ?? MirrorEndurance(),
                    counters: MirrorCounters(),
                    sums: try ChunkSums(size: size),
                    seed: isSeeded ? SeedFilter(size: size) : nil,
                    connectionsAtMost: connectionsAtMost
                )
                disk.onOutage = onOutage
                disk.onFailure = onFailure
                let relay = MirrorRelay(
                    loop: loop,
                    listener: listener,
                    socket: socket,
                    disk: disk,
                    connections: connections,
                    export: options.export,
                    client: client
                )
                relay.serve()
                return relay
            } catch {
                for connection in connections {
                    connection.abort(ChannelError(.closed, "The mirror could not be set up"))
                }
                throw error
            }
        }
    }

    /// A link that swallows everything is noticed by what does not come back.
    static func bounded(_ options: NBDClientOptions) -> NBDClientOptions {
        var options = options
        if options.replyTimeout == nil { options.replyTimeout = .seconds(10) }
        return options
    }

    private func serve() {
        serving = Task(executorPreference: loop) {
            // One QEMU is expected; a second connection may follow when it probes first.
            while let channel = try? await self.listener.accept() {
                guard channel.isFrom(process: self.client) else {
                    channel.close()
                    continue
                }
                try? await self.server.serve(channel)
            }
        }
    }

    /// Receives the table of what the destination has; without one, everything is sent once this has failed.
    ///
    /// - Parameters:
    ///   - connect: opens the connection on which it comes as data frames, on the relay's loop.
    ///   - onBreak: is told on the loop why the table broke off.
    public func followTable(
        _ connect: @escaping @Sendable (EventLoop) async throws -> MessageConnection,
        onBreak: @escaping @Sendable (String) -> Void
    ) {
        Task(executorPreference: loop) {
            guard let seed = self.disk.seed else { return }
            do {
                if let reason = await seed.follow(try await connect(self.loop)) { onBreak(reason) }
            } catch {
                seed.end()
                onBreak("\(error)")
            }
        }
    }

    /// The copy has caught up: no more of the table is wanted.
    public func endTable() async {
        try? await loop.run { self.disk.seed?.end() }
    }

    /// Fails everything under way: QEMU's mirror job ends with an error. From any thread.
    public func abort(_ reason: String) {
        loop.execute {
            self.disk.abort(ChannelError(.closed, reason))
            self.listener.close()
        }
    }

    /// Tells where the destination's server listens from now on. From any thread.
    public func move(to address: SocketAddress) { loop.execute { self.disk.move(to: address) } }

    /// Changes how many bytes a second a disk may send that was begun with an image, if that is limited. From any thread.
    public func limit(to speed: UInt64) { loop.execute { self.disk.limit(to: speed) } }

    /// Why the relay failed; nil while it works.
    public func failure() async -> String? {
        try? await loop.run { self.disk.failure?.message }
    }

    /// The destination is asked to make everything durable once QEMU has gone, so that QEMU's own FLUSHes need not wait for that.
    public func promiseBarrier() async { try? await loop.run { self.disk.promiseBarrier() } }

    /// QEMU has gone: waits until the destination has everything. The end of its export is no outage from then on.
    ///
    /// - Returns: what went through the relay, to be compared with what is at the destination.
    /// - Throws: `MigrationError` when something of it has failed.
    public func rest() async throws -> DiskProof {
        try await loop.run {
            do { try await self.disk.rest() } catch let error as NBDError {
                throw MigrationError(.failed, error.message)
            }
            return self.disk.sums.proof()
        }
    }

    /// Closes the relay in order, after QEMU has gone.
    public func close() async {
        try? await loop.run {
            self.listener.close()
            await self.export.close()
            await self.disk.disconnect()
        }
    }
}
