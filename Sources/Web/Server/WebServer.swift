internal import Emulator
internal import FoundationEssentials
internal import Glibc
public import IO
public import Migration
public import TLS

/// The face of an agent: a page for browsers, the feed behind it, what it may ask for, and figures for Prometheus. `docs/web.md` describes it.
///
/// It has a loop of its own, and reads and encodes on threads that go after others when processors are busy: nothing of it is on a loop that
/// carries data or decides.
public final class WebServer: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// How a server is set up.
    public struct Configuration: Sendable {
        /// Where browsers connect, by TLS or to a Unix socket; nil for no page.
        public var listen: SocketAddress?
        /// Where Prometheus connects, without TLS: an address of loopback; nil for no such port.
        public var metrics: SocketAddress?
        /// The Unix socket at which the commands of this host reach consoles; nil for none.
        public var commands: SocketAddress?
        /// A server's, of a kind that browsers know; nil for a server on a Unix socket.
        public var credentials: (any TLSCredentials)?
        /// Whose certificates give the right to look.
        public var access: AccessControl
        /// Whether they were named for that: others, who may do something else here, are told of no guest.
        public var namesLookers = true
        /// Names by which browsers call this host through a proxy: NAME or NAME:PORT.
        public var names: [String] = []
        /// The directory of noVNC, with which browsers show screens.
        public var viewerFiles = "/usr/share/novnc"
        /// Where viewers of VNC find screens by TLS; nil for nowhere.
        public var screens: Screens?
        /// The agent.
        public var host: WebHost
        /// What the operator reads.
        public var log: Log

        /// Where viewers of VNC find screens, each guest's at its own port.
        public struct Screens: Sendable {
            /// The address.
            public var host: String
            /// Whose certificates open them.
            public var access: AccessControl

            /// Names an address, and who may.
            public init(host: String, access: AccessControl) { (self.host, self.access) = (host, access) }
        }

        /// Makes a configuration.
        public init(host: WebHost, access: AccessControl, log: Log) {
            self.host = host
            self.access = access
            self.log = log
        }
    }

    /// The usual port of the page.
    public static let port: UInt16 = 10810
    /// The usual port of the figures.
    public static let metricsPort: UInt16 = 10811
    /// How far reading and encoding go after others (setpriority(2)): enough to be done in between, and to be no burden.
    private static let niceness: Int32 = 10
    /// How long a set of names is good before it is read again for a name that is not in it.
    private static let namesLife = Duration.seconds(10)

    let configuration: Configuration
    let loop = EventLoop(name: "web")
    let pool = BlockingPool(width: 2, niceness: WebServer.niceness)
    /// Actions start processes, which are to be like those that others start.
    let actionPool = BlockingPool(width: WebLimits.actions)
    let feed: Feed
    let actor: WebActor
    let consoles: ConsoleDesk
    let displays: DisplayDesk
    let viewerFiles: ViewerFiles
    private var displayPorts: DisplayPorts?
    var tickets = Tickets()
    var sessions = Sessions()
    /// Actions that are being carried out.
    var actions = 0
    private var connections = WebConnections()
    private let refusals: LimitedLog
    /// Who opens consoles, and what becomes of them: anybody who may can do so again and again.
    let openings: LimitedLog
    /// The handshakes of the present second.
    private var handshakes = (second: ContinuousClock.now, count: 0)
    private var listeners: NetworkListener?
    private var plainListeners: NetworkListener?
    private var commandListeners: NetworkListener?
    private var names = OwnNames(hosts: [], proxies: [])
    private var namesRead = ContinuousClock.now
    /// What the migrations of this host add up to.
    var totals = MigrationTotals()

    private init(_ configuration: Configuration) {
        self.configuration = configuration
        feed = Feed(configuration.host, on: loop, pool)
        actor = WebActor(host: configuration.host)
        // That a guest stands still is to be told soon above all on a host that is busy.
        let troubles = TroubleWatch(configuration.host, on: loop, .shared)
        refusals = LimitedLog(configuration.log)
        openings = LimitedLog(configuration.log, of: "openings")
        consoles = ConsoleDesk(configuration.host, on: loop, pool, configuration.log, openings: openings, troubles)
        displays = DisplayDesk(
            stateDirectory: configuration.host.stateDirectory,
            on: loop,
            pool,
            configuration.log,
            troubles
        )
        viewerFiles = ViewerFiles(directory: configuration.viewerFiles)
    }

    var log: Log { configuration.log }

    /// Starts a server.
    ///
    /// - Throws: `CredentialError` for credentials that browsers do not know, `MigrationError` for a metrics address that is not loopback,
    ///   `ChannelError` for an address that cannot be listened on.
    public static func start(_ configuration: Configuration) async throws -> WebServer {
        if let listen = configuration.listen, listen.host != nil {
            guard let credentials = configuration.credentials, credentials.usesCertificates, credentials.verifiesPeer
            else {
                throw CredentialError(
                    "The page wants credentials of tls-creds-x509: browsers know no others; without them it can listen on --web unix:PATH"
                )
            }
        }
        if configuration.screens != nil {
            guard let credentials = configuration.credentials, credentials.usesCertificates, credentials.verifiesPeer
            else {
                throw CredentialError(
                    "--vnc-tls wants credentials of tls-creds-x509 that verify the peer: viewers of VNC show who they are by a certificate"
                )
            }
        }
        let server = WebServer(configuration)
        do { try await server.loop.run { try await server.listen() } } catch {
            server.loop.stop()
            throw error
        }
        return server
    }

    private func listen() async throws {
        openPassage()
        try await readNames()
        do {
            if let address = configuration.listen { listeners = try await Self.listener(address, "--web", loop) }
            if let address = configuration.commands {
                commandListeners = try await Self.listener(address, "--state-dir", loop)
            }
            if let address = configuration.metrics {
                let hosts = try await address.resolved().compactMap(\.host)
                guard !hosts.isEmpty, hosts.allSatisfy({ $0 == "::1" || $0.hasPrefix("127.") }) else {
                    throw MigrationError(
                        .failed,
                        "--metrics \(address) is not an address of loopback, and this port has no TLS; name 127.0.0.1 or localhost, and let "
                            + "Prometheus on another host ask the port of --web with a certificate"
                    )
                }
                plainListeners = try await Self.listener(address, "--metrics", loop)
            }
        } catch {
            listeners?.close()
            commandListeners?.close()
            throw error
        }
        if let listeners { serve(listeners, configuration.listen?.host == nil ? .local : .secure) }
        if let plainListeners { serve(plainListeners, .plain) }
        if let commandListeners { serve(commandListeners, .command) }
        consoles.start()
        guard let screens = configuration.screens, let credentials = configuration.credentials else { return }
        displayPorts = DisplayPorts(
            screens,
            credentials,
            displays,
            stateDirectory: configuration.host.stateDirectory,
            on: loop,
            pool,
            log,
            openings
        ) { [weak self] in
            await self?.takeTurn()
        }
        displayPorts?.start()
    }

    private static func listener(
        _ address: SocketAddress,
        _ option: String,
        _ loop: EventLoop
    ) async throws -> NetworkListener {
        do { return try await NetworkListener.listen(on: [address], loop: loop) } catch let error as ChannelError
            where error.number == EADDRINUSE
        {
            throw MigrationError(
                .failed,
                "\(error); another program has this port, 'ss -ltnp' shows which. End that, or name another port with \(option)"
            )
        }
    }

    /// The URLs of the page, one for each address; `unix:PATH` for a Unix socket.
    public var addresses: [String] {
        (listeners?.addresses ?? []).map { address in
            if case .unix = address { return "\(address)" }
            return "https://\(address)/"
        }
    }

    /// The URL of the page by a name that browsers can know: that of a proxy, the one that was listened on, or the host's.
    var ticketAddress: String {
        if let proxy = configuration.names.first { return "https://\(proxy)/" }
        guard let port = listeners?.addresses.first?.port, let host = configuration.listen?.host else { return "" }
        let isEverywhere = host.isEmpty || host == "0.0.0.0" || host == "::"
        return "https://\(SocketAddress.inet(host: isEverywhere ? configuration.host.name : host, port: port))/"
    }

    /// The URLs of the figures on the plain port.
    public var metricsAddresses: [String] { (plainListeners?.addresses ?? []).map { "http://\($0)/metrics" } }

    /// Ends the server: nobody is served any more.
    public func stop() async {
        try? await loop.run {
            self.listeners?.close()
            self.plainListeners?.close()
            self.commandListeners?.close()
            self.feed.stop()
            self.consoles.stop()
            self.displayPorts?.stop()
            self.displays.stop()
        }
        loop.stop()
    }

    // MARK: connections

    private func serve(_ listeners: NetworkListener, _ door: WebDoor) {
        Task(executorPreference: loop) {
            await listeners.serve { channel in
                if let victim = self.connections.add(channel) {
                    self.note(
                        "dropped \(victim.peerName): the limit of \(WebLimits.unprovenConnections) connections without a right is "
                            + "reached, and its network has the most of them"
                    )
                    victim.abort(ChannelError(.closed, "Too many connections have shown no right"))
                }
                defer {
                    self.connections.remove(channel)
                    channel.close()
                }
                do { try await self.serve(channel, door) } catch let error as ChannelError
                    where [.closed, .truncated].contains(error.code)
                {
                    // Browsers open connections that they never use, and close them as they like.
                    self.log(.debug, "web: connection from \(channel.peerName): \(error)")
                } catch { self.note("connection from \(channel.peerName): \(error)") }
            }
        }
    }

    private func serve(_ socket: SocketChannel, _ door: WebDoor) async throws {
        let local = socket.localAddress
        if door == .plain {
            let visit = Visit(door: .plain, socket: socket, certificate: nil, user: nil, local: local)
            return try await serve(HTTPConnection(socket), visit)
        }
        if door.isLocal {
            // A guest's QEMU may have this user, and must not have a word here.
            let isEmulator = socket.peerCredentials.map { RunningEmulator.isEmulator($0.process) } ?? false
            guard socket.isFrom(process: nil), !isEmulator else {
                throw ChannelError(.protocolViolation, "the local socket is for this user and root")
            }
            let uid = socket.peerCredentials?.user
            let name = uid.flatMap { getpwuid($0) }.flatMap { $0.pointee.pw_name }.map { String(cString: $0) }
            let user = name ?? uid.map { "user \($0)" }
            let visit = Visit(door: door, socket: socket, certificate: nil, user: user, local: local)
            return try await serve(HTTPConnection(socket), visit)
        }
        guard let credentials = configuration.credentials else { return }
        let channel = try await socket.withDeadline(WebLimits.handshake, for: "The TLS handshake") {
            // Who says nothing costs no session.
            try await socket.waitReadable()
            await takeTurn()
            return try await TLSChannel.handshake(
                over: socket,
                credentials: credentials,
                clientCertificate: .optional,
                timeout: WebLimits.handshake
            )
        }
        socket.limitUnsent(256 << 10)
        let peer = channel.session.peer
        let visit = Visit(
            door: .secure,
            socket: socket,
            certificate: peer.identities.isEmpty ? nil : peer,
            user: nil,
            local: local
        )
        try await serve(HTTPConnection(channel), visit)
        try? await channel.withDeadline(.seconds(1), for: "The end") { try await channel.finishWriting() }
    }

    /// Waits until another handshake may begin: anybody can ask for one, and each takes a millisecond of a processor.
    func takeTurn() async {
        while true {
            let now = ContinuousClock.now
            if now - handshakes.second >= .seconds(1) { handshakes = (now, 0) }
            if handshakes.count < WebLimits.handshakes {
                handshakes.count += 1
                return
            }
            await loop.sleep(for: handshakes.second + .seconds(1) - now)
        }
    }

    private func serve(_ connection: HTTPConnection, _ visit: Visit) async throws {
        while true {
            let request: HTTPRequest
            do {
                guard let next = try await connection.next() else { return }
                request = next
            } catch let failure as HTTPFailure {
                note("a request from \(visit.peerName) is none: \(failure.reason)")
                let answer = HTTPResponse(failure.status, error: failure.reason)
                try await connection.write(answer.encoded(closes: true))
                return await connection.linger()
            }
            if request.path == ["events"], request.method == "GET", [.secure, .local].contains(visit.door) {
                if try await watch(request, connection, visit) { continue }
                return
            }
            if request.isConsole, visit.door != .plain {
                if try await converse(request, connection, visit) { continue }
                return
            }
            if request.isDisplay, visit.door != .plain {
                if try await show(request, connection, visit) { continue }
                return
            }
            let answer = await answer(to: request, visit)
            note(answer, to: request, visit)
            let closes = request.fields.has("connection", token: "close")
            try await connection.write(answer.encoded(isHead: request.method == "HEAD", closes: closes))
            if closes { return }
        }
    }

    /// Logs what anybody on the network can cause, but not as often as anybody wants.
    func note(_ text: String, _ level: Log.Level = .warning) {
        refusals(level, "web: \(text)")
    }

    /// Logs a refusal.
    func note(_ answer: HTTPResponse, to request: HTTPRequest, _ visit: Visit) {
        guard answer.isRefusal else { return }
        // What a page does that nobody has signed in to is no attack.
        let isPlain = answer.status == 401 && request.method == "GET"
        note(
            "\(request.method.shown(most: 16)) \(request.shownPath) from \(visit.peerName) was answered with \(answer.status): "
                + String(decoding: answer.body.prefix(200), as: UTF8.self),
            isPlain ? .info : .warning
        )
    }

    // MARK: names

    private func readNames() async throws {
        var proxies: Set<Authority> = []
        for name in configuration.names {
            // As in a URL.
            guard let authority = Authority(parsing: name, defaultPort: WebScheme.https.defaultPort) else {
                throw MigrationError(.failed, "'\(name)' of --web-name is no NAME or NAME:PORT")
            }
            proxies.insert(authority)
        }
        let (directory, configured) = (configuration.host.credentials, [configuration.listen, configuration.metrics])
        let hosts = await pool.value {
            var hosts: Set<String> = ["localhost", HostExamination.ownName.lowercased()]
            for address in configured {
                // That of no host is none that a browser is to call this one.
                guard let host = address?.host, !["", "0.0.0.0", "::"].contains(host) else { continue }
                hosts.insert(host.lowercased())
            }
            guard let directory else { return hosts }
            for entry in CredentialDirectory(checking: directory).entries where entry.file.hasPrefix("server-cert") {
                for name in entry.names where name.hasPrefix("DNS:") || name.hasPrefix("IP:") {
                    hosts.insert(String(name.drop { $0 != ":" }.dropFirst()).lowercased())
                }
            }
            return hosts
        }
        names = OwnNames(hosts: hosts, proxies: proxies)
        namesRead = .now
    }

    /// Whether a request was meant for this host. The names are those of a certificate that may have been renewed.
    func isOurs(_ request: HTTPRequest, _ visit: Visit) async -> Bool {
        let host = request.fields["host"] ?? ""
        if visit.door.isLocal { return OwnNames.isLocal(host) }
        if names.accepts(host: host, at: visit.local, visit.door.scheme) { return true }
        guard ContinuousClock.now - namesRead > Self.namesLife else { return false }
        try? await readNames()
        return names.accepts(host: host, at: visit.local, visit.door.scheme)
    }

    /// Whether the page that asks is ours. A program that opens the Unix socket is no page and names none; a browser that is led there
    /// (`ssh -L`) names the one that asks.
    func isOwnOrigin(_ request: HTTPRequest, _ visit: Visit) -> Bool {
        let (origin, host) = (request.fields["origin"], request.fields["host"] ?? "")
        if visit.door.isLocal, origin == nil { return true }
        return names.accepts(origin: origin, host: host, visit.door.scheme)
    }

    // MARK: rights

    /// What the client of a request may do; nil when it has shown nothing.
    func presence(_ request: HTTPRequest, _ visit: Visit) -> Presence? {
        switch visit.door {
        case .plain: return nil
        case .local, .command:
            let grant = WebGrant(name: visit.user ?? "a local user", rights: [.view, .act])
            return Presence(grant: grant, session: nil, expires: nil)
        case .secure: break
        }
        if let secret = request.cookie(Self.cookie), let session = sessions.find(secret) {
            return Presence(grant: session.grant, session: session.number, expires: session.expires)
        }
        guard let certificate = visit.certificate, (try? configuration.access.check(certificate)) != nil else {
            return nil
        }
        var grant = WebGrant(name: certificate.name, rights: .view)
        grant.namesGuests = configuration.namesLookers
        return Presence(grant: grant, session: nil, expires: nil)
    }

    /// Counts a connection as one whose client has shown a right.
    func prove(_ visit: Visit) -> String? { connections.prove(visit.socket) }

    /// The name of the cookie: the prefix binds it to this host, to its root and to TLS (RFC 6265bis, section 4.1.3.2).
    static let cookie = "__Host-crossdock"
}
