import ArgumentParser
import Destination
import Emulator
import Fleet
import Glibc
import IO
import Migration
import NBD
import Source
import TLS
import Web

struct DestinationCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "destination",
        abstract: "Receives guests: the destination agent.",
        discussion: """
            Ends on SIGTERM or SIGINT; guests that run on this host go on running. SIGHUP loads the credentials again. \
            Objects are added, listed and removed while it runs with 'crossdock object'. What guests may have can also be said in a file \
            (--policy): the rules are --allow-directory, --allow-bridge, --allow-listen, --allow-seed, --most-memory, --most-processors, \
            --most-disk, --most-guests, --most-incoming, --allow-recall, --allow-console and --guest-network, without their dashes, \
            'rule = value' in each line.
            """
    )

    @OptionGroup var common: CommonOptions
    @OptionGroup var security: CredentialOptions

    @Option(
        help: ArgumentHelp(
            "The id of an authz object that each source must pass; without it every peer with a certificate may migrate guests "
                + "to this host.",
            valueName: "id"
        )
    )
    var tlsAuthz: String?

    @Flag(
        help:
            "Every peer with a certificate of the authority may migrate guests to this host: needed without --tls-authz for the credentials in /etc/pki/qemu, which other services share."
    )
    var allowAllOfAuthority = false

    @Option(help: ArgumentHelp("Where source agents connect; port 0 lets the system choose.", valueName: "host:port"))
    var listen: String = ":\(MessageConnection.port)"

    @Option(help: ArgumentHelp("Where the disks are exported.", valueName: "host:port"))
    var nbdListen: String = ":\(NBDWire.port)"

    @Option(help: "Where disk images are made; STATE-DIR/images when it is not given.")
    var imageDir: String?

    @Option(
        help: ArgumentHelp(
            "How long a source that was lost in the middle of its copy is waited for: 90s, 10m.",
            default: TimeSpan.usualPatience,
            valueName: "time"
        ),
        transform: TimeSpan.parse
    )
    var patience = TimeSpan.usualPatience

    @Option(
        name: .customLong("allow-directory"),
        help: ArgumentHelp(
            "A directory of this host in which guests may name files: backing images, credentials, firmware. They are opened for "
                + "reading only. May be repeated; the usual directories of firmware are listed always.",
            valueName: "dir"
        )
    )
    var allowedDirectories: [String] = []

    @Flag(help: "Start only if guests can be confined in every way that Crossdock knows, and refuse what cannot.")
    var requireConfinement = false

    @Flag(
        help:
            "Do not confine guests, but for QEMU's filter of system calls: for a QEMU that is wrapped in a program of one's own."
    )
    var noConfinement = false

    @Option(
        help: ArgumentHelp(
            "The numbers of the users that guests get, one each, or 'none': numbers that nobody else has on this host.",
            valueName: "first-last"
        )
    )
    var guestUsers = "\(GuestUsers.defaultRange.lowerBound)-\(GuestUsers.defaultRange.upperBound)"

    @OptionGroup var rules: PolicyOptions
    @OptionGroup var face: WebOptions

    private func userRange() throws -> ClosedRange<UInt32>? {
        if guestUsers == "none" { return nil }
        let numbers = guestUsers.split(separator: "-", omittingEmptySubsequences: false).map { UInt32($0) }
        guard numbers.count == 2, let first = numbers[0], let last = numbers[1], first > 0, last < UInt32.max - 1,
            first <= last
        else {
            throw ValidationError("--guest-users wants two numbers, 'FIRST-LAST', or 'none', not '\(guestUsers)'")
        }
        return first...last
    }

    func validate() throws {
        try patience.checkPatience()
        _ = try userRange()
        var policy = GuestPolicy()
        try rules.apply(to: &policy)
        if requireConfinement, noConfinement {
            throw ValidationError("--require-confinement and --no-confinement exclude each other")
        }
    }

    /// What the operator lets guests have, from the file and the flags.
    private func policy() throws -> GuestPolicy {
        var policy = try rules.file()
        try rules.apply(to: &policy)
        policy.directories += allowedDirectories.map { DurableFile.resolve($0, in: currentDirectory) }
        return policy
    }

    /// What moves guests away, with a source agent that has the agent's own credentials.
    private func sendAway() -> SendAway {
        let (state, start) = (common.stateDirectory, startMove())
        return { departure, ended in
            var plan = MigrationPlan(
                id: MigrationStore.makeID(),
                guest: departure.guest,
                host: departure.host,
                port: departure.port,
                stateDirectory: state
            )
            plan.identity = departure.identity
            plan.networks = departure.networks.map { NetworkMap($0, isForMany: true) }
            return try start(plan, ended)
        }
    }

    /// Starts a source agent and logs what becomes of its migration. It returns the migration's id, and says when it has ended, with the reason when the
    /// guest has not left.
    private func startMove() -> @Sendable (MigrationPlan, @escaping @Sendable (String?) -> Void) throws -> String {
        let (selection, directory, log) = (security.selection, currentDirectory, common.log)
        return { plan, ended in
            let agent = try SourceAgent.start(
                SourceAgentOrder(plan: plan, credentials: selection, directory: directory)
            )
            Task.detached {
                var failure: String? = "its source agent said nothing of the end"
                defer { ended(failure) }
                do {
                    for try await event in agent.events {
                        guard let report = event.report else { continue }
                        let reason = report.reason.map { ": \($0)" } ?? ""
                        log(
                            report.outcome == .migrated ? .info : .warning,
                            "Migration \(agent.migration): guest '\(report.guest)' \(report.outcome.rawValue)\(reason)"
                        )
                        failure = report.outcome == .migrated ? nil : report.reason ?? report.outcome.rawValue
                    }
                } catch {
                    log(.warning, "Migration \(agent.migration): \(error)")
                    failure = "\(error)"
                }
            }
            return agent.migration
        }
    }

    /// Starts the consoles, and the page and the figures, if they were asked for.
    private func startWeb(
        _ agent: DestinationAgent,
        _ configuration: DestinationAgent.Configuration
    ) async throws -> WebServer {
        let (state, start) = (common.stateDirectory, startMove())
        let host = WebHost(agent, configuration, selection: security.selection) { guest, target in
            let plan = MigrationPlan(
                id: MigrationStore.makeID(),
                guest: guest,
                host: target.host,
                port: target.port,
                stateDirectory: state
            )
            return try start(plan) { _ in }
        }
        return try await face.start(
            host,
            credentials: configuration.credentials,
            objects: configuration.objects,
            authorization: configuration.authorization,
            log: common.log
        )
    }

    /// The authorisation that a pairing has written, for an agent that was told neither credentials nor who may send; nil without one.
    private func fleet(_ objects: ObjectStore) throws -> String? {
        guard security.tlsCreds == nil, !allowAllOfAuthority, DurableFile.exists(FleetFiles.peers) else { return nil }
        let id = "crossdock-fleet"
        try objects.add(ObjectDescription(parsing: "authz-list-file,id=\(id),filename=\(FleetFiles.peers)"))
        common.log(.info, "who may send guests is said in \(FleetFiles.peers)")
        return id
    }

    /// What looks at this host for somebody who would send guests here, and at the way back to them.
    private func examineHost(imageDirectory: String) -> ExamineHost {
        let host = HostExamination(
            stateDirectory: common.stateDirectory,
            imageDirectory: imageDirectory,
            credentials: security.selection.directory
        )
        let selection = security.selection
        return { examine, peer, address in
            var host = host
            host.measuresDisk = examine.measuresDisk
            let examination = host
            var found = await BlockingPool.shared.value { examination.findings() }
            guard let back = examine.address else { return found }
            do {
                let credentials = try selection.credentials(.client, from: selection.store(), user: "the examination")
                found += await Doctor.wayBack(to: back, of: peer, from: address, credentials)
            } catch { found.append(Finding(.certificate, .warn, message: "The way back: \(error)")) }
            return found
        }
    }

    func run() async throws {
        let signals = AsyncStream<Int32>.makeStream()
        SignalWatcher.start([SIGINT, SIGTERM, SIGHUP]) { signals.continuation.yield($0) }
        try await failing {
            let state = common.stateDirectory
            let policy = try policy()
            let objects = try security.store()
            let credentials = try security.credentials(.server, from: objects, user: "the destination agent")
            // An agent starts QEMU for its peers: it has to know who they are.
            guard credentials.verifiesPeer else {
                throw CredentialError(
                    "The credentials '\(credentials.id)' do not verify who connects, and who connects to a destination agent "
                        + "starts guests on this host; use tls-creds-x509 with verify-peer=on, or tls-creds-psk"
                )
            }
            let authorization = try tlsAuthz ?? fleet(objects)
            try security.selection.checkAuthority(authorization: authorization, allowsAll: allowAllOfAuthority) {
                common.log(.warning, $0)
            }
            if let authorization { try objects.checkAuthorizer(authorization, of: "--tls-authz") }
            var configuration = DestinationAgent.Configuration(
                listen: try SocketAddress(parsing: listen, defaultPort: MessageConnection.port),
                nbdListen: try SocketAddress(parsing: nbdListen, defaultPort: NBDWire.port),
                imageDirectory: imageDir.map { DurableFile.resolve($0, in: currentDirectory) } ?? "\(state)/images",
                stateDirectory: state,
                credentials: credentials,
                objects: objects,
                authorization: authorization,
                log: common.log
            )
            configuration.policy = policy
            configuration.allowedDirectories = AllowedDirectories(policy.directories)
            configuration.patience = .seconds(patience.seconds)
            configuration.confinement = ConfinementPolicy(
                noConfinement ? .off : requireConfinement ? .required : .available,
                directories: AllowedDirectories.firmware + policy.directories
            )
            configuration.guestUsers = try userRange()
            configuration.sendAway = sendAway()
            // The list of who may send is this agent's own affair only when it asks it.
            if tlsAuthz == nil, authorization != nil {
                configuration.takeMembers = { members in
                    try FleetFiles().accept(SignedFleetList(list: members.list, signature: members.signature))
                }
            }
            if authorization != nil, FleetFiles().hasAuthority {
                configuration.isMember = { identity in
                    ((try? CertificateRenewal(FleetFiles()).list())?.members ?? []).contains { $0.identity == identity }
                }
                configuration.renewCertificate = { identity, request in
                    let issued = try CertificateRenewal(FleetFiles()).issue(to: identity, request)
                    return .init(certificate: issued.certificate, authority: issued.authority)
                }
            }
            configuration.examineHost = examineHost(imageDirectory: configuration.imageDirectory)
            let server = Guarded<WebServer?>(nil)
            configuration.commands[ConsoleQuery.name] = ConsoleQuery.answering { server.withLock { $0 } }
            configuration.commands[ConsoleQuery.tailName] = ConsoleQuery.answeringTail { server.withLock { $0 } }
            configuration.commands[ConsoleQuery.releaseName] = ConsoleQuery.answeringRelease { server.withLock { $0 } }
            configuration.followConsole = { guest, tail in
                await server.withLock { $0 }?.followConsole(of: guest, tail)
            }
            let running = Guarded<DestinationAgent?>(nil)
            configuration.commands[ConsoleQuery.leftName] = ConsoleQuery.answeringLeft({ server.withLock { $0 } }) {
                running.withLock { $0 }
            }
            configuration.commands[ConsoleQuery.stillName] = ConsoleQuery.answeringStill { server.withLock { $0 } }
            configuration.expectConsole = { guest in await server.withLock { $0 }?.expectConsole(of: guest) }
            configuration.openConsole = { request in
                await server.withLock { $0 }?.console(
                    for: request.opening,
                    identity: request.identity,
                    mayWrite: request.mayWrite,
                    mayStay: request.mayStay
                )
            }
            configuration.consoleAbsence = { opening in await server.withLock { $0 }?.absence(of: opening) }
            configuration.commands[WebTicketCommand.name] = WebTicketCommand.answering { server.withLock { $0 } }
            let agent = try await DestinationAgent.start(configuration)
            running.withLock { $0 = agent }
            let web: WebServer
            do { web = try await startWeb(agent, configuration) } catch {
                await agent.stop()
                throw error
            }
            server.withLock { $0 = web }
            for path in FencedImages.purge(common.migrations) {
                common.log(.info, "deleted \(path), whose time is over")
            }
            var words = "crossdock destination: listening on \(agent.address), NBD port \(agent.nbdPort)\n"
            for address in web.addresses { words += "crossdock destination: page at \(address)\n" }
            for address in web.metricsAddresses { words += "crossdock destination: figures at \(address)\n" }
            output(words)
            for await signal in signals.stream {
                guard signal == SIGHUP else { break }
                let result = try objects.reload()
                for id in result.reloaded { common.log(.info, "reloaded '\(id)'") }
                for failure in result.failures { common.log(.error, "\(failure)") }
            }
            await web.stop()
            await agent.stop()
        }
    }
}
