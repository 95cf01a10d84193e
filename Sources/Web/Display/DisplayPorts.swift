internal import Emulator
internal import IO
internal import Migration
internal import TLS

/// The ports at which viewers of VNC find the screens of this host's guests, each guest's at its own: by TLS inside of RFB (VeNCrypt, X509None),
/// with a certificate of the viewer's. Confined to its loop; the state directory is read by threads of the pool.
final class DisplayPorts: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// Which guests of this host have a port. Reads records again only when they have changed. Blocks; used by one thread at a time.
    private final class Roll: @unchecked Sendable {
        // Unchecked: one look at a time.
        private let store: GuestStore
        private var known: [String: (stamp: FileStamp, port: UInt16?)] = [:]

        init(_ store: GuestStore) { self.store = store }

        func look() -> [String: UInt16] {
            let names = DurableFile.list(store.directory)
            let there = Set(names)
            for name in known.keys where !there.contains(name) { known[name] = nil }
            for name in names {
                guard let stamp = FileStamp("\(store.directory(of: name))/guest.json") else {
                    known[name] = nil
                    continue
                }
                if known[name]?.stamp == stamp { continue }
                let record = (try? store.load(name)) ?? nil
                known[name] = (stamp, record?.released == nil ? record?.placement?.vncPort : nil)
            }
            return known.compactMapValues(\.port)
        }
    }

    /// A guest's port.
    private struct Place {
        var port: UInt16
        /// nil while nobody can be listened for there.
        var listeners: NetworkListener?
    }

    /// Between two looks.
    private static let period = Duration.seconds(1)
    /// How long RFB and TLS may take.
    private static let patience = Duration.seconds(10)

    private let screens: WebServer.Configuration.Screens
    private let credentials: any TLSCredentials
    private let desk: DisplayDesk
    private let roll: Roll
    private let loop: EventLoop
    private let pool: BlockingPool
    private let log: Log
    private let turn: () async -> Void
    private var places: [String: Place] = [:]
    private var unproven = UnprovenConnections(limit: WebLimits.unprovenViewers)
    private let refusals: LimitedLog
    private let openings: LimitedLog
    private var timer: LoopTimer?
    private var isOver = false

    /// - Parameters:
    ///   - screens: where, and who may.
    ///   - credentials: a server's, which want a certificate of the viewer's.
    ///   - desk: who looks at screens.
    ///   - openings: for who is let in.
    ///   - turn: waits until another TLS handshake may begin.
    init(
        _ screens: WebServer.Configuration.Screens,
        _ credentials: any TLSCredentials,
        _ desk: DisplayDesk,
        stateDirectory: String,
        on loop: EventLoop,
        _ pool: BlockingPool,
        _ log: Log,
        _ openings: LimitedLog,
        turn: @escaping () async -> Void
    ) {
        (self.screens, self.credentials, self.desk, self.turn) = (screens, credentials, desk, turn)
        (self.loop, self.pool, self.log) = (loop, pool, log)
        (self.openings, refusals) = (openings, LimitedLog(log))
        roll = Roll(GuestStore(stateDirectory: stateDirectory))
    }

    /// Begins to listen where guests have ports.
    func start() {
        Task(executorPreference: loop) {
            let roll = self.roll
            await self.settle(await self.pool.value { roll.look() })
            guard !self.isOver else { return }
            self.timer = self.loop.schedule(after: Self.period) { [weak self] in self?.start() }
        }
    }

    /// Listens nowhere any more.
    func stop() {
        isOver = true
        timer?.cancel()
        for place in places.values { place.listeners?.close() }
        places = [:]
    }

    private func settle(_ wanted: [String: UInt16]) async {
        for (guest, place) in places where wanted[guest] != place.port {
            place.listeners?.close()
            places[guest] = nil
        }
        for (guest, port) in wanted.sorted(by: { $0.key < $1.key }) where places[guest]?.listeners == nil && !isOver {
            do {
                let address = SocketAddress.inet(host: screens.host, port: port)
                let listeners = try await NetworkListener.listen(on: [address], loop: loop)
                guard !isOver else { return listeners.close() }
                places[guest] = Place(port: port, listeners: listeners)
                log(.info, "web: viewers of VNC find the screen of guest '\(guest)' at \(address)")
                serve(listeners, guest)
            } catch {
                // It may be free later, so each second is tried and once is said.
                if places[guest] == nil { log(.warning, "web: the screen of guest '\(guest)' has no port: \(error)") }
                places[guest] = Place(port: port)
            }
        }
    }

    private func serve(_ listeners: NetworkListener, _ guest: String) {
        Task(executorPreference: loop) {
            await listeners.serve { socket in
                if let victim = self.unproven.add(socket) {
                    victim.abort(ChannelError(.closed, "Too many viewers have not shown who they are"))
                }
                defer {
                    self.unproven.remove(socket)
                    socket.close()
                }
                do { try await self.serve(socket, guest) } catch {
                    self.refusals(.warning, "web: a viewer of guest '\(guest)' from \(socket.peerName): \(error)")
                }
            }
        }
    }

    private func serve(_ socket: SocketChannel, _ guest: String) async throws {
        var handshake = RFBServerHandshake(.certificates)
        try await socket.withDeadline(Self.patience, for: "The handshake of a viewer") {
            try await socket.write(handshake.greeting)
            let buffer = IOBuffer(capacity: 64)
            var isClear = true
            while isClear {
                let count = try await socket.readSome(into: buffer.mutable(0..<buffer.capacity))
                guard count > 0 else { throw ChannelError(.closed, "It has gone in the handshake") }
                for action in try handshake.receive(buffer.bytes(0..<count)) {
                    if case .send(let bytes) = action { try await socket.write(bytes) } else { isClear = false }
                }
            }
            await turn()
        }
        let channel = try await TLSChannel.handshake(
            over: socket,
            credentials: credentials,
            timeout: Self.patience
        )
        defer { channel.close() }
        let peer = channel.session.peer
        func refuse(_ reason: String) async throws {
            for case .send(let bytes) in handshake.refuse(reason) { try await channel.write(bytes) }
            try? await channel.withDeadline(.seconds(1), for: "The end") { try await channel.finishWriting() }
            throw RFBFailure.refused("\(peer.name.shown(most: 200)): \(reason)")
        }
        // Two certificates of one name are one visitor, as two sessions of one browser are not.
        let visitor = "certificate \(peer.name)"
        do { try screens.access.check(peer) } catch {
            return try await refuse("This certificate opens no screens here")
        }
        unproven.remove(socket)
        guard desk.count < WebLimits.displayViewers, desk.count(of: visitor) < WebLimits.displayViewersOfVisitor else {
            return try await refuse("Too many look at screens")
        }
        let source = desk.source(of: guest)
        let display: DisplayConnection
        do { display = try await desk.open(source) } catch { return try await refuse(error.reason) }
        do {
            for case .send(let bytes) in handshake.encrypted() { try await channel.write(bytes) }
        } catch {
            display.channel.close()
            throw error
        }
        openings(.info, "web: \(peer.name.shown(most: 200)) at \(socket.peerName) opens the screen of guest '\(guest)'")
        let access = screens.access
        let session = DisplaySession(
            .init(plain: channel, handshake),
            display,
            source,
            guest: guest,
            visitor: visitor,
            mayWrite: true,
            reserve: desk.reserve
        ) { (try? access.check(peer)) != nil }
        await desk.serve(session)
    }
}
