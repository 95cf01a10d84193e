import ArgumentParser
import Destination
import Emulator
import Fleet
import IO
import Migration
import Source
import TLS
import Web

/// The face of the destination agent.
struct WebOptions: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "Where browsers find the agent's page, by TLS; an empty host is loopback, and unix:PATH a socket whose owner may act. Off "
                + "without it; 'crossdock web ticket' opens it.",
            valueName: "host:port"
        )
    )
    var web: String?

    @Option(
        help: ArgumentHelp(
            "A name by which browsers call this host besides those of its certificate: that of a proxy, as in a URL. May be repeated.",
            valueName: "name[:port]"
        )
    )
    var webName: [String] = []

    @Option(
        help: ArgumentHelp(
            "The id of an authz object: whose certificates may look at the page; without it those that --tls-authz lets pass see the host and its "
                + "figures, and no guest.",
            valueName: "id"
        )
    )
    var webAuthz: String?

    @Option(
        help: ArgumentHelp(
            "Where Prometheus finds figures without TLS: an address of loopback.",
            valueName: "host:port"
        )
    )
    var metrics: String?

    @Option(
        help: ArgumentHelp(
            "The address at which viewers of VNC find the screens of guests by TLS (VeNCrypt, X509None), each at the port that 'crossdock guest "
                + "set GUEST --vnc-port' gives it; needs --vnc-authz. Off without it.",
            valueName: "host"
        )
    )
    var vncTls: String?

    @Option(
        help: ArgumentHelp(
            "The id of an authz object: whose certificates open the screens of --vnc-tls.",
            valueName: "id"
        )
    )
    var vncAuthz: String?

    private static func address(_ text: String, port: UInt16) throws -> SocketAddress {
        let address: SocketAddress
        do { address = try SocketAddress(parsing: text, defaultPort: port) } catch { throw ValidationError("\(error)") }
        switch address {
        case .inet("", let port): return .inet(host: "127.0.0.1", port: port)
        case .vsock: throw ValidationError("'\(text)' is no address for browsers; write HOST:PORT or unix:PATH")
        default: return address
        }
    }

    func webAddress() throws -> SocketAddress? { try web.map { try Self.address($0, port: WebServer.port) } }

    func metricsAddress() throws -> SocketAddress? {
        guard let metrics else { return nil }
        let address = try Self.address(metrics, port: WebServer.metricsPort)
        guard case .inet = address else { throw ValidationError("--metrics takes HOST:PORT") }
        return address
    }

    func validate() throws {
        if try webAddress() == nil, !webName.isEmpty || webAuthz != nil {
            throw ValidationError("--web-name and --web-authz are for an agent with --web")
        }
        guard (vncTls == nil) == (vncAuthz == nil) else {
            throw ValidationError(
                "--vnc-tls and --vnc-authz go together: not each certificate that may send guests here opens their screens"
            )
        }
        _ = try metricsAddress()
    }

    /// Starts the server: without a word from anybody it has consoles only, on a socket of the state directory.
    func start(
        _ host: WebHost,
        credentials: any TLSCredentials,
        objects: ObjectStore,
        authorization: String?,
        log: Log
    ) async throws -> WebServer {
        let (page, figures) = (try webAddress(), try metricsAddress())
        if let webAuthz { try objects.checkAuthorizer(webAuthz, of: "--web-authz") }
        let access = AccessControl(objects: objects, authorization: webAuthz ?? authorization)
        var configuration = WebServer.Configuration(host: host, access: access, log: log)
        (configuration.listen, configuration.metrics) = (page, figures)
        configuration.namesLookers = webAuthz != nil
        configuration.commands = .unix(path: ConsoleCommand.socket(stateDirectory: host.stateDirectory))
        configuration.credentials = credentials
        configuration.names = webName
        if let vncTls, let vncAuthz {
            try objects.checkAuthorizer(vncAuthz, of: "--vnc-authz")
            configuration.screens = .init(
                host: vncTls.isEmpty ? "127.0.0.1" : vncTls,
                access: AccessControl(objects: objects, authorization: vncAuthz)
            )
        }
        return try await WebServer.start(configuration)
    }
}

/// What the agent tells its page, and does for it.
extension WebHost {
    /// The host of a destination agent.
    ///
    /// - Parameters:
    ///   - agent: the agent.
    ///   - configuration: how it is set up.
    ///   - selection: the credentials, which moves and questions use as a client's.
    ///   - directory: what relative paths among them begin from.
    init(
        _ agent: DestinationAgent,
        _ configuration: DestinationAgent.Configuration,
        selection: CredentialSelection,
        move: @escaping @Sendable (String, EvacuationOrder.Target) throws -> String
    ) {
        self.init(
            name: HostExamination.ownName,
            version: Crossdock.number,
            address: "\(agent.address)",
            stateDirectory: configuration.stateDirectory,
            imageDirectory: configuration.imageDirectory,
            credentials: selection.directory
        )
        figures = {
            guard let known = try? await agent.figures() else { return nil }
            return WebHost.Figures(
                memory: .init(total: known.memory, available: known.freeMemory, promised: known.promisedMemory),
                disk: .init(total: known.disk, available: known.freeDisk, promised: known.promisedDisk)
            )
        }
        traffic = {
            let known = await agent.traffic()
            return WebHost.Traffic(
                exportConnections: known.exportConnections,
                diskBytes: known.diskBytes,
                memoryBytes: known.memoryBytes
            )
        }
        let own = HostExamination.ownName
        peers = { await Self.fleet(but: own, selection) }
        self.move = move
        openConsole = { departure, opening, loop in
            let credentials = try await BlockingPool.shared.run {
                try selection.credentials(.client, from: selection.store(), user: "the consoles")
            }
            return try await RemoteConsole.open(departure, opening, credentials: credentials, on: loop)
        }
    }

    /// The other members of the fleet, all asked at once.
    private static func fleet(but own: String, _ selection: CredentialSelection) async -> [WebHost.Peer] {
        let found = await BlockingPool.shared.value { () -> ([FleetMember], any TLSCredentials)? in
            guard let list = try? CertificateRenewal(FleetFiles()).list(),
                let credentials = try? selection.credentials(.client, from: selection.store(), user: "the page")
            else { return nil }
            // The host's own name in the list is the one that leads here.
            let others = list.members.filter { member in !member.hosts.contains(own) }
            return (others, credentials)
        }
        guard let (members, credentials) = found, !members.isEmpty else { return [] }
        let loop = EventLoop(name: "peers")
        defer { loop.stop() }
        return await withTaskGroup(of: WebHost.Peer.self) { group in
            for member in members {
                group.addTask {
                    let host = member.name
                    let probe = await PeerProbe.look(at: host, port: MessageConnection.port, credentials, on: loop)
                    var peer = WebHost.Peer(name: member.name, address: "\(host):\(MessageConnection.port)")
                    peer.up = probe.error == nil
                    (peer.roundTripMS, peer.clockOffsetMS) = (probe.roundTripMS, probe.clockOffsetMS)
                    peer.error = probe.error
                    return peer
                }
            }
            var peers: [WebHost.Peer] = []
            for await peer in group { peers.append(peer) }
            return peers.sorted { $0.name < $1.name }
        }
    }
}
