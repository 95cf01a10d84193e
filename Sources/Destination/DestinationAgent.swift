internal import CLinux
public import Emulator
internal import Glibc
public import IO
public import Migration
internal import NBD
internal import Synchronization
public import TLS

/// The agent that receives guests: a control port for the handshake protocol and QEMU's streams, and an NBD port.
public final class DestinationAgent: @unchecked Sendable {
    // Unchecked: confined to the control loop.

    /// How an agent is set up.
    public struct Configuration: Sendable {
        /// Where the control port listens.
        public var listen: SocketAddress
        /// Where the NBD server listens.
        public var nbdListen: SocketAddress
        /// Where disk images are made.
        public var imageDirectory: String
        /// Where guests and migrations are recorded.
        public var stateDirectory: String
        /// Who we are, and whom we trust.
        public var credentials: any TLSCredentials
        /// The objects of the process, which the control socket changes.
        public var objects: ObjectStore
        /// The id of the authorisation that each peer is checked against, QEMU's `tls-authz`; nil for everybody whom the
        /// credentials trust.
        public var authorization: String?
        /// How long a source that was lost in the middle of its copy is waited for.
        public var patience = Duration.seconds(300)
        /// How everything is confined that is started for guests.
        public var confinement = ConfinementPolicy()
        /// Where guests may name files of this host.
        public var allowedDirectories = AllowedDirectories()
        /// What its operator lets guests have. Its directories are those of `allowedDirectories` and `confinement`.
        public var policy = GuestPolicy()
        /// The users that guests get, one each, where the agent may give them; nil for its own.
        public var guestUsers: ClosedRange<UInt32>? = GuestUsers.defaultRange
        /// What moves guests away that their home asks for; nil for an agent that sends none back.
        public var sendAway: SendAway?
        /// What examines this host for others; nil for an agent that examines nothing.
        public var examineHost: ExamineHost?
        /// What takes the list of the fleet over; nil for an agent of no fleet.
        public var takeMembers: TakeMembers?
        /// What issues a member's next certificate; nil for an agent whose host has no authority.
        public var renewCertificate: RenewCertificate?
        /// What knows the members of the fleet; nil for an agent of no fleet.
        public var isMember: IsMember?
        /// What goes on with the console of a guest that has come here; nil for an agent that holds no consoles.
        public var followConsole: (@Sendable (_ guest: String, ConsoleTail) async -> Void)?
        /// What begins to hold the console of a guest that is about to come, before its processors start; nil likewise.
        public var expectConsole: (@Sendable (_ guest: String) async -> Void)?
        /// What opens a console for another host's agent; it returns nil when there is none. Nil for an agent that has none for others.
        public var openConsole: (@Sendable (ConsoleRequest) async -> ServeConsole?)?
        /// What says, half a sentence, why a console that there is cannot be had now; nil when there is none.
        public var consoleAbsence: (@Sendable (ConsoleOpening) async -> String?)?
        /// Further commands of the control socket, by their names.
        public var commands: [String: ControlSocket.Command] = [:]
        /// What the operator reads.
        public var log: Log

        /// Makes a configuration.
        public init(
            listen: SocketAddress,
            nbdListen: SocketAddress,
            imageDirectory: String,
            stateDirectory: String,
            credentials: any TLSCredentials,
            objects: ObjectStore = ObjectStore(),
            authorization: String? = nil,
            log: Log = Log()
        ) {
            self.listen = listen
            self.nbdListen = nbdListen
            self.imageDirectory = imageDirectory
            self.stateDirectory = stateDirectory
            self.credentials = credentials
            self.objects = objects
            self.authorization = authorization
            self.log = log
        }
    }

    /// How many connections are accepted before others on the loop have their turn.
    private static let acceptedAtOnce = 16
    /// How long an agent that ends may keep the state directory's lock.
    private static let takeOverPatience = Duration.seconds(10)

    let configuration: Configuration
    let guests: GuestStore
    let migrations: MigrationStore
    let exports = ExportTable()
    /// The loop of the control port and of everything that decides.
    public let loop: EventLoop
    let dataLoops: EventLoopGroup
    /// Which life of the agent this is.
    let generation = EmulatorProcess.bootID.prefix(8) + "-" + MigrationStore.makeID()
    private var control: Listener?
    private var nbd: Listener?
    /// What takes disks.
    private(set) var diskServer: NBDServer?
    private let receivedMemory = Atomic<UInt64>(0)
    private var socket: ControlSocket?
    private var incoming: [String: IncomingMigration] = [:]
    /// What each identity holds.
    let accounts = PeerAccounts()
    /// What the guests of each identity take.
    var ledger = GuestLedger()
    /// Why the network of guests is not filtered; nil when it is, or need not be.
    private(set) var filterObstacle: String?
    /// Connections that have not said HELLO.
    private var unproven = UnprovenConnections(limit: PeerLimits.unprovenConnections)
    private let refusals: LimitedLog
    /// Who opens consoles here: a host that may can do so again and again.
    let openings: LimitedLog
    /// Why guests of this host that were asked for have not left when they were sent last.
    var failedReturns: [String: String] = [:]
    /// The order in which reservations are made durable.
    let reservationLock = AsyncLock()
    /// Whose switchover it is.
    let turns: SwitchoverTurns
    /// Who may have the consoles of guests that came from there.
    let grants: ConsoleGrants
    private let stateLock: FileLock
    /// Gives each guest a user; nil where that cannot be.
    private let users: GuestUsers?

    private init(_ configuration: Configuration, loop: EventLoop, dataLoops: EventLoopGroup, lock: FileLock) {
        self.configuration = configuration
        self.loop = loop
        self.dataLoops = dataLoops
        stateLock = lock
        turns = SwitchoverTurns(on: loop)
        users = Self.users(configuration)
        refusals = LimitedLog(configuration.log)
        openings = LimitedLog(configuration.log, of: "openings")
        grants = ConsoleGrants(stateDirectory: configuration.stateDirectory)
        guests = GuestStore(stateDirectory: configuration.stateDirectory)
        migrations = MigrationStore(stateDirectory: configuration.stateDirectory)
    }

    var log: Log { configuration.log }
    var reservationFile: ReservationFile { ReservationFile(stateDirectory: configuration.stateDirectory) }
    var access: AccessControl {
        AccessControl(objects: configuration.objects, authorization: configuration.authorization)
    }
    /// Bytes of guests' memory that have come. From any thread.
    var memoryBytes: UInt64 { receivedMemory.load(ordering: .relaxed) }
    /// Counts bytes of a guest's memory. From any thread.
    func countMemory(_ count: Int) { receivedMemory.wrappingAdd(UInt64(count), ordering: .relaxed) }

    /// The NBD server's port.
    public var nbdPort: UInt16 { nbd?.address.port ?? 0 }
    /// The control port's address.
    public var address: SocketAddress { control?.address ?? configuration.listen }

    /// Starts an agent: takes up what an earlier one left, then listens.
    ///
    /// - Throws: `MigrationError`, `FileError` or `ChannelError` naming the directory or the address that cannot be used.
    public static func start(_ configuration: Configuration) async throws -> DestinationAgent {
        DescriptorBudget.raise()
        try checkConfinement(configuration)
        try DurableFile.makeDirectory(configuration.stateDirectory)
        try ImageDirectory.prepare(configuration.imageDirectory, stateDirectory: configuration.stateDirectory)
        let lock = try await stateLock(configuration)
        let loop = EventLoop(name: "control")
        let data = EventLoopGroup(name: "data")
        let agent = DestinationAgent(configuration, loop: loop, dataLoops: data, lock: lock)
        agent.filterObstacle = await installFilter(configuration, hasUsers: agent.users != nil)
        do {
            try await loop.run { try await agent.listen() }
        } catch {
            agent.loop.stop()
            data.stop()
            throw error
        }
        return agent
    }

    private static func users(_ configuration: Configuration) -> GuestUsers? {
        let places = [configuration.imageDirectory, "\(configuration.stateDirectory)/guests"]
        guard configuration.confinement.strictness != .off, let range = configuration.guestUsers,
            ConfinementPolicy.obstacleToUsers(for: roots(configuration)) == nil
        else { return nil }
        return GuestUsers(range, file: "\(configuration.stateDirectory)/guest-users.json", places: places)
    }

    /// The agent's own directories that lie in those of others; what is in them it opens itself.
    private static func roots(_ configuration: Configuration) -> [String] {
        let (state, images) = (configuration.stateDirectory, configuration.imageDirectory)
        return images.hasPrefix("\(state)/") ? [state] : [state, images]
    }

    /// How a new guest or blank copy is confined: with a user that nobody else has.
    func makePolicy() async throws -> ConfinementPolicy {
        var policy = configuration.confinement
        guard let users else { return policy }
        policy.user = try await BlockingPool.shared.run { try users.take() }
        policy.roots = [configuration.stateDirectory, configuration.imageDirectory]
        return policy
    }

    /// As whom QEMUs of guests attach to taps.
    var tapUser: TapUser {
        if users != nil { return .itsOwn }
        return configuration.confinement.strictness == .off && geteuid() == 0 ? .everything : .user(geteuid())
    }

    /// Says once what this host lacks, or ends here.
    private static func checkConfinement(_ configuration: Configuration) throws {
        let log = configuration.log
        var missing = ConfinementPolicy.missing(for: roots(configuration))
        if configuration.guestUsers == nil { missing.append("Guests have no users of their own (--guest-users none)") }
        switch configuration.confinement.strictness {
        case .off:
            log(.warning, "guests are not confined: only QEMU's filter of system calls is between them and this host")
        case .available:
            for sentence in missing + ConfinementPolicy.limits() { log(.warning, "confinement: \(sentence)") }
        case .required:
            guard missing.isEmpty else {
                throw MigrationError(
                    .failed,
                    "This host cannot confine guests as --require-confinement asks: \(missing.joined(separator: ". "))"
                )
            }
            for sentence in ConfinementPolicy.limits() { log(.warning, "confinement: \(sentence)") }
        }
    }

    /// The lock on the state directory. An agent that was killed keeps it until the last of its threads has ended, which a
    /// write to a slow disk delays: the one that follows it waits a little.
    private static func stateLock(_ configuration: Configuration) async throws -> FileLock {
        let path = "\(configuration.stateDirectory)/destination.lock"
        let deadline = ContinuousClock.now + takeOverPatience
        var isWaiting = false
        while true {
            if let lock = try FileLock(path) { return lock }
            let holder = FileLock.holder(of: path).map { ", process \($0)," } ?? ""
            guard ContinuousClock.now < deadline else {
                throw MigrationError(
                    .failed,
                    "Another destination agent\(holder) uses the state directory \(configuration.stateDirectory); stop it first, "
                        + "or give this one another --state-dir"
                )
            }
            if !isWaiting {
                isWaiting = true
                configuration.log(
                    .warning,
                    "another destination agent\(holder) uses the state directory \(configuration.stateDirectory); waiting up to "
                        + "\(takeOverPatience.components.seconds) s for its end"
                )
            }
            try await Task.sleep(for: .milliseconds(50))
        }
    }

    private func listen() async throws {
        ledger = try await readLedger()
        await restoreReservations()
        await restore()
        let control = try await listener("control", or: configuration.listen)
        self.control = control
        let nbd = try await listener("nbd", or: configuration.nbdListen)
        self.nbd = nbd
        var limits = NBDServer.Limits()
        limits.connections = PeerLimits.allDiskConnections
        limits.connectionsForPeer = PeerLimits.diskConnections
        limits.payloadForPeer = PeerLimits.diskPayload
        limits.connectionsToExport = PeerLimits.connectionsToExport
        let server = NBDServer(
            exports: exports,
            credentials: configuration.credentials,
            access: access,
            loops: dataLoops,
            limits: limits,
            log: { [log] in log(.warning, $0) },
            note: { [log] in log(.debug, $0) }
        )
        diskServer = server
        socket = try await ControlSocket.start(
            path: ControlSocket.path(stateDirectory: configuration.stateDirectory),
            objects: configuration.objects,
            log: log,
            loop: loop,
            commands: configuration.commands
        ) { id, name, vouching in
            guard let migration = self.incoming[id] else {
                throw MigrationError(.guest, "No guest of migration '\(id)' waits on this host")
            }
            return try await migration.take(by: name, vouching)
        }
        Task(executorPreference: loop) { await server.serve(nbd) }
        Task(executorPreference: loop) { await self.accept(control) }
        log(.info, "listening on \(control.address), NBD on \(nbd.address), images in \(configuration.imageDirectory)")
    }

    /// The socket that systemd opened under this name (FileDescriptorName= of a socket unit), or one of our own.
    private func listener(_ name: String, or address: SocketAddress) async throws -> Listener {
        if let inherited = try NetworkListener.inherited(named: name, loop: loop)?.listeners.first { return inherited }
        do { return try await Listener.listen(on: address, loop: loop) } catch let error as ChannelError
            where error.number == EADDRINUSE
        {
            let option = name == "nbd" ? "--nbd-listen" : "--listen"
            throw MigrationError(
                .failed,
                "\(error); another program has this port, 'ss -ltnp' shows which. End that, or name another port with \(option)"
            )
        }
    }

    /// Takes up the migrations that an earlier agent of this state directory did not finish.
    private func restore() async {
        for id in migrations.ids() {
            let reading: JournalReading?
            do { reading = try migrations.reading(of: id) } catch {
                log(.error, "Migration \(id): \(error)")
                continue
            }
            guard case .destination(let standing) = reading?.standing else { continue }
            guard let migration = IncomingMigration.left(id, agent: self) else {
                if standing == .accepted {
                    // The agent ended before anything was made.
                    try? Journal(opening: migrations.journal(of: id)).append(
                        .rolledBack(reason: "Nothing was made yet")
                    )
                }
                continue
            }
            incoming[id] = migration
            await migration.takeUp()
            if migration.handover.isOver { incoming[id] = nil }
        }
    }

    private func accept(_ listener: Listener) async {
        var accepted = 0
        while let channel = try? await listener.accept() {
            accepted += 1
            if accepted.isMultiple(of: Self.acceptedAtOnce) { await Task.yield() }
            // Whoever holds connections open without a word must not keep others out: an honest peer needs milliseconds.
            if let victim = unproven.add(channel) {
                note(
                    "Dropped \(victim.peerName): the limit of \(PeerLimits.unprovenConnections) connections that have not said HELLO "
                        + "is reached, and its network has the most of them"
                )
                victim.abort(ChannelError(.closed, "Too many connections have not said HELLO"))
            }
            Task(executorPreference: loop) {
                do {
                    try await self.serve(channel)
                } catch let error as ChannelError where error.code == .closed {
                    // Who only looks whether somebody is there.
                    self.note("Connection from \(channel.peerName): \(error)", .info)
                } catch {
                    self.note("Connection from \(channel.peerName): \(error)")
                }
            }
        }
    }

    /// Logs what anybody on the network can cause, but not as often as anybody wants.
    private func note(_ text: String, _ level: Log.Level = .warning) {
        refusals(level, text)
    }

    static func refusal(of identity: String) -> String { "This agent does not let '\(identity)' migrate guests to it" }

    private func serve(_ base: SocketChannel) async throws {
        let opened: (TLSChannel, MessageConnection, Message.Hello)
        var rights = HostConversation.Rights.all
        do {
            defer { unproven.remove(base) }
            opened = try await base.withDeadline(PeerLimits.greeting, for: "The greeting") {
                // Who says nothing costs no session.
                try await base.waitReadable()
                let channel = try await TLSChannel.handshake(over: base, credentials: configuration.credentials)
                let connection = MessageConnection(channel)
                connection.limit = PeerLimits.helloBytes
                let peer = channel.session.peer
                do { try access.check(peer) } catch {
                    if await mayRenew(peer.name) {
                        let hello = try await Self.hello(connection)
                        rights = .renewal
                        if hello.role == .host { return (channel, connection, hello) }
                    }
                    try await connection.send(.abort(Self.refusal(of: peer.name)))
                    throw error
                }
                return (channel, connection, try await Self.hello(connection))
            }
        } catch {
            base.close()
            throw error
        }
        let (channel, connection, hello) = opened
        defer { channel.close() }
        let peer = channel.session.peer
        do {
            try accounts.connect(peer.name)
        } catch {
            try await connection.send(.abort("\(error)"))
            throw error
        }
        defer { accounts.disconnect(peer.name) }
        connection.limit = MessageConnection.maximumMessage
        connection.turns = .init(accounts.longMessages, key: peer.name, deadline: PeerLimits.longMessage)
        guard hello.versions.contains(1) else {
            try await connection.send(.abort("This agent speaks version 1 of the protocol only"))
            return
        }
        guard MigrationStore.isID(hello.migration) else {
            try await connection.send(.abort("The migration's id is malformed"))
            return
        }
        switch hello.role {
        case .control:
            if incoming[hello.migration] == nil,
                let reason = refusal(of: hello.migration, for: peer.name)
            {
                try await connection.send(.abort(reason))
                return
            }
            let migration =
                incoming[hello.migration] ?? IncomingMigration.open(hello.migration, peer: peer, agent: self)
            guard migration.peer.name == peer.name else {
                try await connection.send(.abort("This migration belongs to another source"))
                return
            }
            guard !migration.handover.isStuck else {
                try await connection.send(.abort("This migration cannot be taken up at the moment; ask again"))
                return
            }
            incoming[hello.migration] = migration
            await migration.serve(connection, Feature.known(hello.features))
            if migration.handover.isOver { forget(migration) }
        case .stream:
            guard let migration = incoming[hello.migration], migration.peer.name == peer.name else {
                try await connection.send(.abort("There is no such migration here"))
                return
            }
            base.limitUnsent(256 << 10)
            try await migration.serveStream(hello.lane, channel, connection)
        case .host:
            do { try accounts.beginHost(peer.name) } catch { return try await connection.send(.abort("\(error)")) }
            defer { accounts.endHost(peer.name) }
            try await HostConversation(self, peer, evacuation: hello.migration, rights, connection).serve()
        case .console:
            do { try accounts.beginConsole(peer.name) } catch { return try await connection.send(.abort("\(error)")) }
            defer { accounts.endConsole(peer.name) }
            try await ConsoleConversation(agent: self, peer: peer, channel: channel, connection: connection).serve()
        case .seed:
            guard let migration = incoming[hello.migration], migration.peer.name == peer.name else {
                try await connection.send(.abort("There is no such migration here"))
                return
            }
            try await migration.serveSeed(hello.index, connection)
        }
    }

    /// The first message of a connection; a peer that says something else is told what is wrong.
    private static func hello(_ connection: MessageConnection) async throws -> Message.Hello {
        do {
            guard case .hello(let hello) = try await connection.receiveMessage() else {
                throw ChannelError(.protocolViolation, "the first message is not HELLO")
            }
            return hello
        } catch let error as ChannelError where error.code == .protocolViolation {
            try? await connection.send(.abort("\(error)"))
            throw error
        }
    }

    /// A source that offers a guest anew has given up what it had begun: its earlier migrations of the guest are not waited for.
    func endAbsences(of peer: TLSPeer, guest: String, but id: String) async {
        for migration in incoming.values
        where migration.id != id && migration.peer.name == peer.name && migration.offer?.guest == guest
            // One that is busy is at work for its source, and must not be waited for: it may be waiting for this one.
            && migration.handover.waitsForSource
        {
            await migration.endAbsence("before it offered the guest anew")
        }
    }

    /// The migrations that this agent has to do with.
    var arrivals: [IncomingMigration] { Array(incoming.values) }

    /// A guest has gone from here to the host of an identity: what that one was given for it is over. From any thread.
    ///
    /// - Throws: `FileError`.
    public func forgetGrant(of identity: String, for guest: String) async throws {
        let grants = grants
        try await BlockingPool.shared.run { try grants.remove(guest: guest, identity: identity) }
    }

    /// Nothing is left to do for a migration.
    func forget(_ migration: IncomingMigration) {
        if incoming[migration.id] === migration { incoming[migration.id] = nil }
    }

    /// Why a peer has no part in a migration that is known from its journal only; nil when there is no reason.
    private func refusal(of id: String, for peer: String) -> String? {
        let known: JournalReading?
        do { known = try migrations.reading(of: id) } catch { return "\(error)" }
        guard let known, case .destination(let standing) = known.standing else { return nil }
        if known.peer != peer { return "This migration belongs to another source" }
        // Whoever is told that there is no such migration would count on that.
        return standing.isOver ? nil : "This migration cannot be taken up at the moment; ask again"
    }

    /// Ends the agent: migrations before PREPARED are given up, those after it wait for the next agent, and guests that
    /// run here go on running.
    public func stop() async {
        try? await loop.run {
            self.control?.close()
            self.nbd?.close()
            self.socket?.close()
            for migration in self.incoming.values { await migration.agentStops() }
        }
        loop.stop()
        dataLoops.stop()
    }
}
