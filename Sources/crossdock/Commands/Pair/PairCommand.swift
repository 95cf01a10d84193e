import ArgumentParser
import Fleet
import Glibc
import IO
import Migration

struct PairCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "pair",
        abstract:
            "Makes another host a member of this host's fleet: certificates, authorisation and services on both, over SSH or with a token.",
        discussion: """
            It connects with your keys, agent, password and OpenSSH configuration, of which it runs nothing. Each host makes its own key, which never leaves it; \
            this host keeps the key of the authority. Then each proves that it reaches the other. A failure undoes what was done. Again, it \
            verifies, and renews what is about to expire.

            Exit codes: 0 done; 30 nothing was changed; 31 what had been done was undone; 32 something could not be undone; 33 the hosts were paired before and stay so, and their verification failed.
            """
    )

    @Argument(
        help: ArgumentHelp(
            "The other host, or its alias in ~/.ssh/config; for --undo and --renew also its name in the fleet.",
            valueName: "[user@]host[:port]"
        )
    )
    var host: String?

    @OptionGroup var common: CommonOptions

    @Option(help: ArgumentHelp("Its name in the fleet; that of the host when it is not given.", valueName: "name"))
    var name: String?

    @Option(
        help: ArgumentHelp(
            "Its addresses and further names for migrations, with commas; the one that SSH reaches when it is not given.",
            valueName: "address"
        )
    )
    var address: String?

    @Option(
        help: ArgumentHelp("This host's name in the fleet; that of the host when it is not given.", valueName: "name")
    )
    var ownName: String?

    @Option(
        help: ArgumentHelp(
            "This host's addresses and further names for migrations; the one that SSH comes from when it is not given.",
            valueName: "address"
        )
    )
    var ownAddress: String?

    @Option(help: ArgumentHelp("A private key for SSH.", valueName: "file"))
    var identity: String?

    @Option(help: ArgumentHelp("A file of known hosts in the place of yours.", valueName: "file"))
    var knownHosts: String?

    @Option(
        help: ArgumentHelp(
            "The fingerprint that the host's key must have when it is not known yet; nobody is asked then.",
            valueName: "sha256:..."
        )
    )
    var fingerprint: String?

    @Option(help: ArgumentHelp("Install this package there if that version is not there.", valueName: "deb"))
    var install: String?

    @Option(help: ArgumentHelp("The authority's directory on this host; made when there is none.", valueName: "dir"))
    var ca: String?

    @Flag(help: "Only this host sends: the members of the fleet take no guests of that host.")
    var oneWay = false

    @Flag(help: "Ask nothing: an unknown key and a password are errors.")
    var batch = false

    @Flag(help: "Look at both hosts, and say what would be done.")
    var dryRun = false

    @Flag(help: "End the pairing: the host leaves the fleet and gets back what it had before.")
    var undo = false

    @Flag(
        help:
            "Without SSH: print a token with which the host of this name joins, and wait for it. --address says where it comes from, --own-address where this host is reached."
    )
    var token = false

    @Flag(help: "Without SSH: join with a token, which is asked for, or read from standard input.")
    var join = false

    @Option(
        help: ArgumentHelp("How long a token is good.", valueName: "time"),
        transform: TimeSpan.parse
    )
    var expires = TimeSpan.minutes(10)

    @Option(help: ArgumentHelp("The port that is open as long as a token is; 0 for any.", valueName: "port"))
    var port: UInt16 = JoinOrder.port

    @Flag(help: "List the pairings of this host.")
    var list = false

    @Flag(help: "Verify the pairings, or one, and renew certificates that end within 30 days.")
    var renew = false

    func validate() throws {
        let modes = [undo, list, renew, dryRun, token, join].count { $0 }
        guard modes <= 1 else {
            throw ValidationError("--undo, --list, --renew, --dry-run, --token and --join exclude each other")
        }
        guard !join || host == nil else {
            throw ValidationError("--join takes nothing more: the token is asked for, or read from standard input")
        }
        guard (1...86_400).contains(expires.seconds) else {
            throw ValidationError("--expires takes a time from 1s to 24h: 10m")
        }
        guard host != nil || list || renew || join else { throw ValidationError("Which host? [USER@]HOST[:PORT]") }
        if let fingerprint {
            let digits = fingerprint.dropFirst("SHA256:".count)
            guard fingerprint.hasPrefix("SHA256:"), digits.count == 43,
                digits.utf8.allSatisfy({
                    (48...57).contains($0) || (65...90).contains($0) || (97...122).contains($0) || $0 == 43 || $0 == 47
                })
            else { throw ValidationError("--fingerprint takes SHA256:..., as ssh-keygen -l prints it") }
        }
        if let host, !renew, !undo, !token { _ = try SSHTarget(parsing: host) }
    }

    func run() async throws {
        try await failing {
            let place = PairingPlace(
                files: FleetFiles(authority: ca.map { DurableFile.resolve($0, in: currentDirectory) }),
                stateDirectory: common.stateDirectory,
                program: DurableFile.resolve("/proc/self/exe", in: "/")
            )
            let conductor = PairingConductor(place, say: Self.tell)
            if list { return try show(conductor.pairings(), place.files) }
            if token { return try await waitForOne(conductor) }
            if join { return try await joinOne(place) }
            if renew, host == nil, !place.files.hasAuthority, DurableFile.exists(place.files.list) {
                return try await renewOwn(place)
            }
            let order = try await order()
            let (host, undo, renew, batch, dryRun) = (host, undo, renew, batch, dryRun)
            do {
                try await BlockingPool.shared.run {
                    if renew { return try conductor.renew(host, isBatch: batch) }
                    if undo {
                        if try joiner(place).leave(host ?? "") { return }
                        return try conductor.undo(host ?? "", isBatch: batch)
                    }
                    if let order { try conductor.pair(order, isDry: dryRun) }
                }
            } catch let failure as PairingFailure {
                printError("crossdock: \(failure)")
                throw Self.code(of: failure.outcome)
            }
        }
    }

    @Sendable private static func tell(_ event: PairingConductor.Event) {
        switch event {
        case .done(let what, let how): output("ok    \(what): \(how)\n")
        case .note(let text): output("note  \(text)\n")
        }
    }

    private func joiner(_ place: PairingPlace) -> Joiner { Joiner(place, version: Crossdock.number, say: Self.tell) }

    // MARK: without SSH

    private func waitForOne(_ conductor: PairingConductor) async throws {
        guard let host else { return }
        func words(_ text: String?) -> [String] { (text ?? "").split(separator: ",").map(String.init) }
        var addresses = words(address)
        if addresses.isEmpty {
            addresses = ((try? await SocketAddress.inet(host: host, port: 22).resolved()) ?? []).compactMap(\.host)
        }
        guard let first = addresses.first else {
            throw FleetError("The address of \(host) is not known here; say it with --address")
        }
        var own = words(ownAddress)
        if own.isEmpty { own = [HostExamination.address(towards: first)].compactMap { $0 } }
        guard !own.isEmpty else {
            throw FleetError(
                "There is no way from here to \(first); say with --own-address where \(host) reaches this host"
            )
        }
        var order = JoinOrder(
            host: host,
            addresses: addresses,
            ownName: ownName,
            ownAddresses: own,
            port: port,
            time: .seconds(expires.seconds)
        )
        order.isOneWay = oneWay
        let loop = EventLoop(name: "joining")
        defer { loop.stop() }
        let time = expires
        try await Self.reporting {
            try await JoinWaiting(conductor, order, on: loop).run { token in
                output(
                    "On \(host), run 'crossdock pair --join' and paste this token, which is good for \(time) and once:\n\n"
                )
                output("\(token)\n\n")
            }
        }
    }

    /// A member renews its own certificate; what it is paired with is the business of the authority's host.
    private func renewOwn(_ place: PairingPlace) async throws {
        try await Self.reporting {
            do {
                switch try await OwnRenewal(files: place.files, stateDirectory: place.stateDirectory).run() {
                case .good(let days): output("ok    certificate: good for \(days) more days\n")
                case .renewed(let notes):
                    output("ok    certificate: renewed, for the same names\n")
                    for note in notes { output("note  \(note)\n") }
                }
            } catch { throw PairingFailure(reason: "\(error)", outcome: .kept) }
        }
    }

    private func joinOne(_ place: PairingPlace) async throws {
        let token = try JoinToken(parsing: try await Self.readToken())
        let loop = EventLoop(name: "joining")
        defer { loop.stop() }
        let (joiner, name) = (joiner(place), ownName)
        try await Self.reporting { try await loop.run { try await joiner.run(token, name: name, on: loop) } }
    }

    /// A token is asked for without being shown: whoever looks over a shoulder could use it first.
    private static func readToken() async throws -> String {
        try await BlockingPool.shared.run {
            guard isatty(0) == 1 else { return readLine() ?? "" }
            return OperatorQuestion(isBatch: false).ask("Token: ", isSecret: true) ?? ""
        }
    }

    private static func reporting(_ body: () async throws -> Void) async throws {
        do { try await body() } catch let failure as PairingFailure {
            printError("crossdock: \(failure)")
            throw code(of: failure.outcome)
        }
    }

    private static func code(of outcome: PairingFailure.Outcome) -> ExitCode {
        switch outcome {
        case .unchanged: ExitCode(30)
        case .undone: ExitCode(31)
        case .left: ExitCode(32)
        case .kept: ExitCode(33)
        }
    }

    /// What is to be done; nil for what needs none.
    private func order() async throws -> PairingOrder? {
        guard let host, !undo, !renew else { return nil }
        var target = try SSHTarget(parsing: host)
        target.identity = identity.map { DurableFile.resolve($0, in: currentDirectory) }
        target.knownHosts = knownHosts.map { DurableFile.resolve($0, in: currentDirectory) }
        target.fingerprint = fingerprint
        func words(_ text: String?) -> [String] { (text ?? "").split(separator: ",").map(String.init) }
        var order = PairingOrder(target: target)
        order.name = name
        order.addresses = words(address)
        order.ownName = ownName
        order.ownAddresses = words(ownAddress)
        order.package = install.map { DurableFile.resolve($0, in: currentDirectory) }
        order.isOneWay = oneWay
        order.isBatch = batch
        // An alias of the operator's configuration leads nowhere, and need not.
        let found = try? await SocketAddress.inet(host: target.host, port: 22).resolved()
        order.resolved = (found ?? []).compactMap(\.host)
        return order
    }

    private func show(_ pairings: [Pairing], _ files: FleetFiles) throws {
        // Who joined knows the others by the list that the authority's host has brought.
        if pairings.isEmpty, let signed = try files.signedList(), let authority = try files.trustedAuthority() {
            let list = try signed.verified(by: authority)
            output(
                "This host is a member of a fleet; \((list.keeper ?? "another host").shown(most: 200)) has its authority, and pairs and removes members.\n"
            )
            let rows = list.members.map { member in
                [member.name, member.addresses.joined(separator: " "), member.sends ? "sends and takes" : "only takes"]
            }
            return output(Table.render(["MEMBER", "ADDRESSES", "GUESTS"], rows))
        }
        guard !pairings.isEmpty else { return output("This host is paired with none.\n") }
        let rows = pairings.map { pairing in
            let state = pairing.state == .underway ? "interrupted" : pairing.isBehind ? "behind" : "paired"
            return [
                pairing.member.name, pairing.member.addresses.joined(separator: " "), pairing.target.destination, state,
                pairing.member.sends ? "both ways" : "only from here",
            ]
        }
        output(Table.render(["HOST", "ADDRESSES", "SSH", "STATE", "GUESTS"], rows))
    }
}
