internal import Glibc
internal import IO
internal import Migration
internal import TLS

/// Carries out pairings. Blocks, and asks the operator at the terminal: run it on the pool.
public struct PairingConductor: Sendable {
    /// What the operator is told.
    public enum Event: Sendable {
        /// Something is done, and how.
        case done(String, String)
        /// Something is to be known, a sentence without a full stop.
        case note(String)
    }

    let place: PairingPlace
    let store: PairingStore
    let say: @Sendable (Event) -> Void
    var files: FleetFiles { place.files }

    /// Makes a conductor.
    public init(_ place: PairingPlace, say: @escaping @Sendable (Event) -> Void) {
        self.place = place
        self.say = say
        store = PairingStore(stateDirectory: place.stateDirectory)
    }

    /// A pairing that is being carried out: who takes part.
    struct Session {
        var pairing: Pairing
        var here: MemberRunner
        /// Nil when the other host cannot be reached.
        var there: MemberRunner?
        var package: String?
        /// Whether each has read its list and certificates at the start of its agent.
        var isNewHere = true
        var isNewThere = true

        func other() throws -> MemberRunner {
            guard let there else { throw FleetError("\(pairing.target.destination) cannot be reached") }
            return there
        }
    }

    // MARK: pairing

    /// Pairs this host with another one, or verifies and renews a pairing that is there.
    ///
    /// - Parameter isDry: whether only the plan is made and told.
    /// - Throws: `PairingFailure`.
    public func pair(_ order: PairingOrder, isDry: Bool = false) throws {
        var session: Session
        let earlier: Pairing?
        let lock: PairingLock
        do {
            guard let taken = try store.lock() else { throw FleetError("Another pairing of this host is under way") }
            lock = taken
            let connection = try connect(order.target, isBatch: order.isBatch)
            (session, earlier) = try prepare(order, connection, isDry: isDry)
        } catch { throw PairingFailure(reason: "\(error)", outcome: .unchanged) }
        defer { withExtendedLifetime(lock) {} }
        if isDry { return tell(session) }
        do {
            try perform(&session)
            session.pairing.finish()
            session.pairing.isBehind = false
            try store.write(session.pairing)
        } catch { throw giveUp(session, earlier, error, keepsPackage: false) }
    }

    /// Undoes a pairing that has failed.
    ///
    /// - Parameter earlier: what there was before. It stays: only its verification, or its renewal, has failed.
    func giveUp(
        _ session: Session,
        _ earlier: Pairing?,
        _ error: any Error,
        keepsPackage: Bool
    ) -> PairingFailure {
        if let earlier, earlier.state == .paired {
            try? store.write(earlier)
            return PairingFailure(reason: "\(error)", outcome: .kept)
        }
        let left = undo(session, keepsPackage: keepsPackage)
        return PairingFailure(reason: "\(error)", outcome: left.isEmpty ? .undone : .left(left))
    }

    /// Does what is planned, each step written down before it is done.
    func perform(_ session: inout Session) throws {
        while let step = session.pairing.next {
            session.pairing.begin(step)
            try store.write(session.pairing)
            say(.done(step.title, try perform(step, &session)))
        }
    }

    private func connect(_ target: SSHTarget, isBatch: Bool) throws -> SSHConnection {
        try SSHConnection(to: target, isBatch: isBatch) { [say] in say(.note($0)) }
    }

    /// Looks at both hosts, and says what is to be done.
    private func prepare(
        _ order: PairingOrder,
        _ connection: SSHConnection,
        isDry: Bool
    ) throws -> (Session, earlier: Pairing?) {
        let host = order.target.destination
        let login = try RemoteLogin(over: connection, host)
        say(.done("connection", "\(host), \(login.system)\(login.privilege.isEmpty ? "" : ", as root with sudo")"))
        let here = MemberRunner(here: place.program)
        guard let ownLook = try here.carryOut(.look).look else { throw FleetError("This host says nothing of itself") }
        let there = MemberRunner(host, over: connection, privilege: login.privilege)
        var hadPackage = true
        var isInstalling = false
        if login.version != ownLook.version, let package = order.package {
            hadPackage = login.version != nil
            isInstalling = true
            // What is to be known of the host can only be asked once the package is there.
            if isDry {
                say(.note("apt-get install \(package), on \(host); what follows is found out then"))
            } else {
                try install(package, there)
                say(.done(Pairing.Step.install.title, package))
            }
        } else if login.version == nil {
            throw FleetError(
                "Crossdock is not installed on \(host) (\(login.system), \(login.architecture)): copy the package there and "
                    + "'apt-get install ./crossdock_\(ownLook.version)_\(login.architecture).deb', or say --install DEB"
            )
        }
        do {
            let look =
                isDry && isInstalling
                ? MemberLook(version: ownLook.version, name: order.name ?? order.target.host, clock: ownLook.clock)
                : try there.carryOut(.look).look
            guard let look else { throw FleetError("\(host) says nothing of itself") }
            let way = Way(address: login.address, source: login.source, hasDetour: connection.hasDetour)
            return try plan(order, way, here, there, ownLook, look, hadPackage, isInstalling, isDry)
        } catch {
            if isInstalling, !hadPackage, !isDry { removePackage(there) }
            throw error
        }
    }

    /// What is known of the way between the hosts.
    struct Way {
        /// The address under which the other host was reached.
        var address: String?
        /// The address from which it was.
        var source: String?
        /// Whether the other end sees somebody in between.
        var hasDetour = false
    }

    /// Judges what both hosts say of themselves.
    func plan(
        _ order: PairingOrder,
        _ way: Way,
        _ here: MemberRunner,
        _ there: MemberRunner,
        _ ownLook: MemberLook,
        _ look: MemberLook,
        _ hadPackage: Bool,
        _ isInstalling: Bool,
        _ isDry: Bool
    ) throws -> (Session, earlier: Pairing?) {
        var ownAddresses = order.ownAddresses
        let list = try currentList()
        var own = FleetMember(name: order.ownName ?? ownLook.name, addresses: [])
        let knownOwn = list?.members.first { $0.name == own.name }
        if ownAddresses.isEmpty, knownOwn == nil {
            guard !way.hasDetour else {
                throw FleetError(
                    "\(order.target.destination) is reached through another host, so the address under which it reaches this one "
                        + "is not known; say it with --own-address"
                )
            }
            ownAddresses = [way.source].compactMap { $0 }
        }
        own.addresses = Self.union(knownOwn?.addresses ?? [], ownAddresses)
        var member = FleetMember(name: order.name ?? look.name, addresses: order.addresses, sends: !order.isOneWay)
        let known = list?.members.first { $0.name == member.name }
        if member.addresses.isEmpty { member.addresses = [way.address].compactMap { $0 } }
        // The name that the operator says is the one that 'migrate' will be given, when it leads there.
        if let address = way.address, order.resolved.contains(address), order.target.host != member.name,
            FleetMember.isName(order.target.host), !member.addresses.contains(order.target.host)
        {
            member.addresses.append(order.target.host)
        }
        member.addresses = Self.union(known?.addresses ?? [], member.addresses)
        // Before anything is judged: what it has left would be taken for another fleet's.
        let earlier = try store.all().first { $0.member.name == member.name }
        if let found = earlier, found.state == .underway {
            guard !isDry else {
                throw FleetError(
                    "An earlier pairing with \(member.name) was interrupted; without --dry-run it is undone first, and then done again"
                )
            }
            say(.note("An earlier pairing with \(member.name) was interrupted; it is undone first"))
            let left = undo(Session(pairing: found, here: here, there: there), keepsPackage: true)
            guard left.isEmpty else {
                throw FleetError("An earlier pairing cannot be undone: \(left.joined(separator: "; "))")
            }
            // What was looked at is not there any more.
            guard let fresh = try here.carryOut(.look).look, let other = try there.carryOut(.look).look else {
                throw FleetError("The hosts say nothing of themselves")
            }
            return try plan(order, way, here, there, fresh, other, hadPackage, isInstalling, isDry)
        }
        let authority = files.hasAuthority ? try DurableFile.read("\(files.authority)/ca-cert.pem") : nil
        let judged = try PairingPlan(
            ownLook,
            look,
            host: order.target.destination,
            list: list,
            own: own,
            member: member,
            authority: authority.map { try CertificateAuthority.fingerprint(of: $0) }
        )
        for note in judged.notes { say(.note(note)) }
        var steps = judged.steps
        if isInstalling { steps.insert(.install) }
        var session = Session(
            pairing: Pairing(
                target: order.target,
                member: member,
                own: own,
                plan: steps,
                hadPackage: hadPackage,
                earlier: earlier
            ),
            here: here,
            there: there,
            package: order.package
        )
        session.isNewHere = steps.contains(.certifyHere) || ownLook.list == nil
        session.isNewThere = steps.contains(.certifyThere) || look.list == nil
        return (session, earlier)
    }

    private static func union(_ one: [String], _ other: [String]) -> [String] {
        var seen: Set<String> = []
        return (one + other).filter { seen.insert($0).inserted }
    }

    private func currentList() throws -> FleetList? {
        guard files.hasAuthority, let signed = try files.signedList(), let authority = try files.trustedAuthority()
        else {
            return nil
        }
        return try? signed.verified(by: authority)
    }

    private func tell(_ session: Session) {
        let (member, own) = (session.pairing.member, session.pairing.own)
        for step in session.pairing.plan {
            let text =
                switch step {
                case .install: "apt-get install \(session.package ?? ""), on \(member.name)"
                case .authority: "crossdock pki init \(files.authority)"
                case .certifyHere: "a key here, and its certificate for \(own.hosts.joined(separator: ", "))"
                case .certifyThere:
                    "a key on \(member.name), and its certificate for \(member.hosts.joined(separator: ", "))"
                case .list: "\(FleetFiles.peers) on all members, with \(own.identity) and \(member.identity)"
                case .serve: "systemctl enable --now crossdock-destination, on both"
                case .prove: "crossdock doctor, from each to the other"
                }
            say(.done("would do: \(step.title)", text))
        }
    }

    // MARK: steps

    private func perform(_ step: Pairing.Step, _ session: inout Session) throws -> String {
        let (own, member) = (session.pairing.own, session.pairing.member)
        switch step {
        case .install: return "installed"
        case .authority:
            try DurableFile.makeDirectory(files.authority)
            try CertificateAuthority(name: "Crossdock fleet of \(own.name)").save(to: files.authority)
            return "\(files.authority), whose key stays here"
        case .certifyHere: return try certify(own, session.here)
        case .certifyThere: return try certify(member, session.other())
        case .list: return try list(with: [own, member], session)
        case .serve:
            var notes = try session.here.carryOut(.serve(isNew: session.isNewHere)).notes.map {
                "on \(own.name), \($0)"
            }
            notes += try session.other().carryOut(.serve(isNew: session.isNewThere)).notes.map {
                "on \(member.name), \($0)"
            }
            for note in notes { say(.note(note)) }
            return notes.isEmpty ? "run on both" : "without systemd they are started by hand"
        case .prove: return try prove(session)
        }
    }

    private func certify(_ member: FleetMember, _ runner: MemberRunner) throws -> String {
        let authority = try CertificateAuthority(loading: files.authority)
        guard let request = try runner.carryOut(.request(name: member.name)).request else {
            throw FleetError("\(runner.name) has made no request")
        }
        let certificate = try authority.issue(for: request, .init(name: member.name, hosts: member.hosts))
        _ = try runner.carryOut(.certify(certificate: certificate, authority: try authority.pem))
        return "\(member.identity), for \(member.hosts.joined(separator: ", "))"
    }

    private func list(with members: [FleetMember], _ session: Session) throws -> String {
        try files.rememberAuthority()
        let current = try currentList() ?? FleetList(number: 0, members: [])
        let isMissing = members.contains { !current.members.contains($0) }
        var next = isMissing ? members.reduce(current) { $0.with($1) } : current
        if isMissing { next.keeper = session.pairing.own.name }
        let authority = try CertificateAuthority(loading: files.authority)
        let signed = try next.signed(by: authority)
        _ = try session.here.carryOut(.list(signed))
        _ = try session.other().carryOut(.list(signed))
        deliver(signed, but: session.pairing.member.name)
        return "number \(next.number): \(next.members.map(\.name).joined(separator: ", "))"
    }

    /// Brings a list to all other members, by their agents or over SSH; those that are not reached are named, and get it with the next one, or with `--renew`.
    private func deliver(_ signed: SignedFleetList, but name: String) {
        for var pairing in (try? store.all()) ?? [] where pairing.member.name != name && pairing.state == .paired {
            do {
                if tell(signed, to: pairing.member) {
                    pairing.isBehind = false
                    try store.write(pairing)
                    continue
                }
                if pairing.isJoined { throw FleetError("its agent does not answer, and it joined without SSH") }
                let connection = try connect(pairing.target, isBatch: true)
                let login = try RemoteLogin(over: connection, pairing.member.name)
                let runner = MemberRunner(pairing.member.name, over: connection, privilege: login.privilege)
                _ = try runner.carryOut(.list(signed))
                pairing.isBehind = false
            } catch {
                say(
                    .note(
                        "\(pairing.member.name) has not got the new list: \(error). 'crossdock pair --renew' tries again"
                    )
                )
                pairing.isBehind = true
            }
            try? store.write(pairing)
        }
    }

    /// Brings the list to a member that joined with a token, if it has not got it; it renews its certificate by itself.
    private func bringList(to pairing: Pairing) {
        guard pairing.isBehind else {
            return say(.note("\(pairing.member.name) joined with a token, and renews its certificate by itself"))
        }
        var pairing = pairing
        guard let signed = try? files.signedList(), tell(signed, to: pairing.member) else {
            return say(.note("\(pairing.member.name) has not got the new list: its agent does not answer"))
        }
        pairing.isBehind = false
        try? store.write(pairing)
        say(.done("list of the fleet", "brought to \(pairing.member.name)"))
    }

    /// Brings a list to a member's agent, over TLS.
    private func tell(_ signed: SignedFleetList, to member: FleetMember) -> Bool {
        (member.addresses + [member.name]).contains { host in
            let address = host.contains(":") ? "[\(host)]" : host
            return (try? MemberRunner(here: place.program).carryOut(.bring(signed, address: address))) != nil
        }
    }

    private func prove(_ session: Session) throws -> String {
        let (own, member) = (session.pairing.own, session.pairing.member)
        let ways: [(from: MemberRunner, to: FleetMember, name: String)] = [
            (session.here, member, own.name), (try session.other(), own, member.name),
        ]
        var said: [String] = []
        for (runner, target, name) in ways {
            let address = target.addresses.first ?? target.name
            // The one that only receives is not let in.
            if !session.pairing.member.sends, target == own { continue }
            guard let listener = try (target == own ? session.here : session.other()).carryOut(.look).look,
                listener.isServing
            else {
                say(
                    .note(
                        "\(target.name) is not proved to be reachable: its agent does not run; once it does, 'crossdock doctor \(target.name)' on the other "
                            + "host tells"
                    )
                )
                continue
            }
            let host = address.contains(":") ? "[\(address)]" : address
            let found = try runner.carryOut(.prove(address: host)).findings ?? []
            let failures = found.filter { $0.result == .fail && Self.isAboutTheWay($0.check) }
            guard failures.isEmpty else {
                let reasons = failures.map { "\($0.message ?? $0.check.rawValue) (\($0.remedy ?? ""))" }
                throw FleetError(
                    "\(name) does not reach \(target.name): \(reasons.joined(separator: "; ").shown(most: 2000))"
                )
            }
            let line = found.first { $0.check == .convergence }?.here ?? ""
            let packets = found.first { $0.check == .mtu }?.here ?? ""
            said.append("\(name) to \(target.name): \(line), packets of \(packets)")
        }
        return said.isEmpty ? "nothing could be proved" : said.joined(separator: "; ")
    }

    /// What a host lacks for guests is doctor's to say; a pairing is about the way.
    private static func isAboutTheWay(_ check: Check) -> Bool {
        [.name, .certificate, .ports, .mtu, .agent].contains(check)
    }

    // MARK: the package

    /// How long the package manager may say nothing.
    private static let installation = Duration.seconds(900)

    private func install(_ package: String, _ there: MemberRunner) throws {
        guard let bytes = try DurableFile.read(package, limit: 1 << 30) else {
            throw FleetError("The package \(package) is not there; 'make package' builds it")
        }
        guard let connection = there.connection else { return }
        let command = """
            set -e; directory=$(mktemp -d); trap 'rm -rf "$directory"' EXIT; cat >"$directory/crossdock.deb"; chmod 755 "$directory"; \
            \(there.asRoot("env DEBIAN_FRONTEND=noninteractive apt-get install -y -q \"$directory/crossdock.deb\""))
            """
        let run = try connection.run(command, input: bytes, silence: Self.installation)
        guard run.code == 0 else { throw FleetError("The package cannot be installed on \(there.name): \(run.words)") }
    }

    @discardableResult
    private func removePackage(_ there: MemberRunner) -> String? {
        let command = there.asRoot("env DEBIAN_FRONTEND=noninteractive apt-get remove -y -q crossdock")
        do {
            let run = try there.connection?.run(command, silence: Self.installation)
            return run?.code == 0 ? nil : "the package on \(there.name) stays: \(run?.words ?? "")"
        } catch { return "the package on \(there.name) stays: \(error)" }
    }

    // MARK: undoing

    /// Undoes what a pairing has begun.
    ///
    /// - Returns: what could not be undone, a sentence each.
    func undo(_ session: Session, keepsPackage: Bool) -> [String] {
        var left: [String] = []
        let name = session.pairing.member.name
        let others = ((try? store.all()) ?? []).filter { $0.member.name != name }
        for undo in session.pairing.undoing {
            do {
                switch undo {
                case .listWithout: try leaveList(name, session, isAlone: others.isEmpty)
                case .leaveThere:
                    do { _ = try session.other().carryOut(.leave) } catch  where session.pairing.isJoined {
                        // It undoes by itself what its own connection has not finished.
                        guard session.pairing.state == .paired else { continue }
                        say(
                            .note(
                                "\(name) keeps its certificates, which open nothing any more; 'crossdock pair --undo "
                                    + "\(session.pairing.own.name)' there gives back what it had before"
                            )
                        )
                    }
                case .leaveHere: if others.isEmpty { _ = try session.here.carryOut(.leave) }
                case .removeAuthority: if others.isEmpty { DurableFile.remove(files.authority) }
                case .removePackage:
                    if !keepsPackage, let reason = removePackage(try session.other()) { left.append(reason) }
                }
            } catch { left.append("\(undo.sentence(name)): \(error)") }
        }
        if others.isEmpty { files.forgetAuthority() }
        // As long as something is left, this says what.
        if left.isEmpty { try? store.remove(session.pairing) }
        return left
    }

    private func leaveList(_ name: String, _ session: Session, isAlone: Bool) throws {
        guard let current = try currentList(), current.members.contains(where: { $0.name == name }) else { return }
        let signed = try current.without(name).signed(by: CertificateAuthority(loading: files.authority))
        _ = try session.here.carryOut(.list(signed))
        if !isAlone { deliver(signed, but: name) }
    }

    /// Ends a pairing: all members learn that the host is none any more, and it gets back what it had before. The package stays.
    ///
    /// - Throws: `PairingFailure`.
    public func undo(_ host: String, isBatch: Bool) throws {
        let pairing: Pairing
        let lock: PairingLock
        do {
            guard let taken = try store.lock() else { throw FleetError("Another pairing of this host is under way") }
            lock = taken
            guard let found = try store.find(host) else {
                let known = try store.all().map(\.member.name).joined(separator: ", ")
                throw FleetError(
                    "This host is not paired with '\(host.shown(most: 200))'\(known.isEmpty ? "" : "; it is with \(known)")"
                )
            }
            pairing = found
        } catch { throw PairingFailure(reason: "\(error)", outcome: .unchanged) }
        defer { withExtendedLifetime(lock) {} }
        var there: MemberRunner?
        do {
            if !pairing.isJoined {
                let connection = try connect(pairing.target, isBatch: isBatch)
                let login = try RemoteLogin(over: connection, pairing.target.destination)
                there = MemberRunner(pairing.member.name, over: connection, privilege: login.privilege)
            }
        } catch { say(.note("\(error). The others learn of it all the same")) }
        let session = Session(pairing: pairing, here: MemberRunner(here: place.program), there: there)
        let left = undo(session, keepsPackage: true)
        guard left.isEmpty else {
            throw PairingFailure(reason: "The pairing with \(pairing.member.name) is ended", outcome: .left(left))
        }
        say(.done("undone", "\(pairing.member.name) is no member any more"))
    }

    // MARK: all of them

    /// Verifies pairings, renews certificates that end within 30 days, and brings the list to who has not got it.
    ///
    /// - Parameter host: one; all when nil.
    /// - Throws: `PairingFailure` of the last one that failed.
    public func renew(_ host: String?, isBatch: Bool) throws {
        let pairings: [Pairing]
        do {
            pairings = try store.all().filter { $0.state == .paired }.filter { pairing in
                try host == nil || store.find(host ?? "")?.member.name == pairing.member.name
            }
            guard host == nil || !pairings.isEmpty else {
                throw FleetError("This host is not paired with '\(host ?? "")'")
            }
        } catch { throw PairingFailure(reason: "\(error)", outcome: .unchanged) }
        var failure: (any Error)?
        do { if host == nil { try renewHere() } } catch {
            say(.note("This host's own certificate is not renewed: \(error)"))
            failure = PairingFailure(reason: "\(error)", outcome: .kept)
        }
        for pairing in pairings {
            if pairing.isJoined {
                bringList(to: pairing)
                continue
            }
            var order = PairingOrder(target: pairing.target)
            order.name = pairing.member.name
            order.addresses = pairing.member.addresses
            order.ownName = pairing.own.name
            order.ownAddresses = pairing.own.addresses
            order.isOneWay = !pairing.member.sends
            order.isBatch = isBatch
            do { try pair(order) } catch {
                say(.note("\(pairing.member.name): \(error)"))
                failure = error
            }
        }
        if let failure { throw failure }
    }

    /// Renews the certificate of the host that has the authority: members ask this host, and it asks nobody.
    private func renewHere() throws {
        guard let list = try currentList() else { return }
        let here = MemberRunner(here: place.program)
        guard let look = try here.carryOut(.look).look,
            let own = list.members.first(where: { $0.identity == look.identity }),
            (look.ends ?? 0) - Int(look.clock / 1000) < CertificateRenewal.margin
        else { return }
        guard let lock = try store.lock() else { throw FleetError("Another pairing of this host is under way") }
        defer { withExtendedLifetime(lock) {} }
        say(.done(Pairing.Step.certifyHere.title, try certify(own, here)))
        for note in try here.carryOut(.serve(isNew: true)).notes { say(.note("on \(own.name), \(note)")) }
    }

    /// The pairings of this host. Blocks.
    ///
    /// - Throws: `FleetError` for one that is damaged.
    public func pairings() throws -> [Pairing] { try store.all() }
}

extension Pairing.Undo {
    fileprivate func sentence(_ name: String) -> String {
        switch self {
        case .removePackage: "the package on \(name)"
        case .removeAuthority: "the authority"
        case .leaveHere: "the certificates here"
        case .leaveThere: "the certificates on \(name) ('crossdock pair --undo \(name)' when it can be reached)"
        case .listWithout: "the list of the fleet"
        }
    }
}
