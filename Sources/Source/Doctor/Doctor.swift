internal import Emulator
internal import FoundationEssentials
internal import Glibc
public import IO
public import Migration
public import TLS

/// What `crossdock doctor` does: this host looks at itself, another host at itself, both at the way between them, and guests are
/// rehearsed. What passes migrates: the rehearsal is the one that every migration begins with.
public struct Doctor: Sendable {
    /// What is looked at.
    public struct Order: Sendable {
        /// The host that guests would go to; nil to look at this host alone.
        public var target: EvacuationOrder.Target?
        /// The guests that would go there.
        public var guests: [String] = []
        /// How this host is examined.
        public var host: HostExamination
        /// The credentials.
        public var credentials: CredentialSelection
        /// Where the agent of this host is reached from there, `HOST[:PORT]`; nil to leave the way back out.
        public var ownAddress: String?

        /// Makes an order.
        public init(host: HostExamination, credentials: CredentialSelection) {
            self.host = host
            self.credentials = credentials
        }
    }

    private let order: Order
    private let loop: EventLoop
    private let say: @Sendable (String) -> Void

    /// Looks, and changes nothing.
    ///
    /// - Parameters:
    ///   - order: at what.
    ///   - say: is told what is being done, a sentence each.
    /// - Returns: what was found, in the order of the checks, guests last.
    public static func examine(_ order: Order, say: @escaping @Sendable (String) -> Void) async -> [Finding] {
        let loop = EventLoop(name: "doctor")
        defer { loop.stop() }
        return await Doctor(order: order, loop: loop, say: say).examine()
    }

    private func examine() async -> [Finding] {
        say("looking at this host")
        let host = order.host
        let own = await BlockingPool.shared.value { host.findings() }
        guard let target = order.target else { return Self.merged(own, []) }
        say("looking at \(target)")
        let credentials: any TLSCredentials
        do {
            credentials = try order.credentials.credentials(.client, from: order.credentials.store(), user: "doctor")
        } catch {
            let finding = Finding(
                .certificate,
                .fail,
                message: "\(error)",
                remedy: "crossdock pki check /etc/pki/crossdock"
            )
            return Self.merged(own + [finding], [])
        }
        let loop = loop
        do {
            let (between, theirs) = try await loop.run { try await look(at: target, credentials) }
            var found = Self.merged(own, theirs) + between
            found = Check.allCases.flatMap { check in found.filter { $0.check == check } }
            if between.contains(where: { $0.result == .fail }) { return found }
            for guest in order.guests { found += await rehearse(guest, target, credentials) }
            return found
        } catch { return Self.merged(own, []) + [Finding(.agent, .fail, message: "\(error)")] }
    }

    // MARK: the other host

    private func look(
        at target: EvacuationOrder.Target,
        _ credentials: any TLSCredentials
    ) async throws -> (between: [Finding], theirs: [Finding]) {
        let peer = ControlConnection.Peer(host: target.host, port: target.port)
        let probe = HostProbe(peer: peer, credentials: credentials, loop: loop)
        var between = [await resolution(of: target)]
        if between[0].result == .fail { return (between, []) }
        between += await probe.controlPort()
        if between.contains(where: { $0.result == .fail }) { return (between, []) }
        let plan = MigrationPlan(
            id: MigrationStore.makeID(),
            guest: "doctor",
            host: target.host,
            port: target.port,
            stateDirectory: order.host.stateDirectory
        )
        between.append(await probe.rate(plan))
        if between.contains(where: { $0.result == .fail }) { return (between, []) }
        let host = TargetHost(target, evacuation: plan.id, credentials: credentials, on: loop)
        defer { host.close() }
        do {
            if let state = try await host.state() { between += Self.admission(state, target) }
            let asked = Date.now
            let question = HostMessage.Examine(address: order.ownAddress, measuresDisk: order.host.measuresDisk)
            guard let answer = try await host.examine(question) else {
                between.append(
                    Finding(
                        .agent,
                        .warn,
                        there: "an earlier release",
                        message: "The agent on \(target) is of an earlier release, and does not say what it lacks",
                        remedy: "install the same release there"
                    )
                )
                return (between, [])
            }
            between.append(Self.clocks(answer.clock, asked, .now))
            between.append(await probe.nbdPort(answer.nbdPort))
            return (between, answer.findings.prefix(200).map { $0.seen(on: target.host) })
        } catch {
            between.append(
                Finding(.agent, .fail, message: "\(error)", remedy: "journalctl -u crossdock-destination there")
            )
            return (between, [])
        }
    }

    private func resolution(of target: EvacuationOrder.Target) async -> Finding {
        do {
            let found = try await SocketAddress.inet(host: target.host, port: target.port).resolved()
            let hosts = found.compactMap(\.host)
            let isHere = hosts.contains { $0 == "::1" || $0.hasPrefix("127.") } && !target.host.hasPrefix("127.")
            return Finding(
                .name,
                isHere ? .warn : .ok,
                there: hosts.joined(separator: " "),
                message: isHere ? "'\(target.host)' leads to a loopback address, which is this host itself" : nil,
                remedy: isHere ? "mend /etc/hosts or the name server" : nil
            )
        } catch {
            return Finding(
                .name,
                .fail,
                there: target.host,
                message: "\(error)",
                remedy: "put the host into /etc/hosts, or name an address that its certificate is for"
            )
        }
    }

    private static func admission(_ state: HostState, _ target: EvacuationOrder.Target) -> [Finding] {
        guard let cordon = state.cordon else { return [] }
        return [
            Finding(
                .agent,
                .fail,
                there: "cordoned",
                message: "\(target) takes no guests: \(MigrationContext.said(cordon))",
                remedy: "crossdock uncordon, on \(target.host)"
            )
        ]
    }

    /// A clock that was read between two moments.
    static func clocks(_ there: Int64, _ asked: Date, _ answered: Date) -> Finding {
        let (first, last) = (asked.timeIntervalSince1970 * 1000, answered.timeIntervalSince1970 * 1000)
        let there = Double(there)
        // Within the time that the question took nothing is known.
        let skew = there < first ? first - there : there > last ? there - last : 0
        let text = skew < 1000 ? "within \(max(Int(skew), 1)) ms" : "\(Int(min(skew / 1000, 1e12))) s apart"
        guard skew >= 1000 else { return Finding(.clock, .ok, here: text) }
        return Finding(
            .clock,
            skew >= 3_600_000 ? .fail : .warn,
            here: text,
            message:
                "The clocks of the two hosts are \(text): guests notice, and certificates are not valid yet or any more",
            remedy: "timedatectl set-ntp true, on both"
        )
    }

    // MARK: the way back

    /// Tries the agent of who asks, for EXAMINE.
    ///
    /// - Parameters:
    ///   - address: where that agent listens, as who asks says.
    ///   - peer: who asks; the agent has to be of the same identity.
    ///   - source: where the question came from: nobody else is connected to.
    ///   - credentials: this host's.
    /// - Returns: what was found, as seen from here.
    public static func wayBack(
        to address: String,
        of peer: TLSPeer,
        from source: SocketAddress?,
        _ credentials: any TLSCredentials
    ) async -> [Finding] {
        let loop = EventLoop(name: "way-back")
        defer { loop.stop() }
        let found = try? await loop.run {
            guard address.utf8.count <= 255, let target = try? EvacuationOrder.Target(parsing: address) else {
                return [Finding(.name, .fail, message: "'\(address.shown(most: 255))' is no HOST:PORT")]
            }
            let hosts = (try? await SocketAddress.inet(host: target.host, port: target.port).resolved()) ?? []
            guard !hosts.isEmpty else {
                return [
                    Finding(
                        .name,
                        .warn,
                        there: target.host,
                        message: "'\(target.host)' leads nowhere: guests do not find their way home",
                        remedy: "put the host into /etc/hosts"
                    )
                ]
            }
            guard hosts.contains(where: { $0.host == source?.host }) else {
                return [
                    Finding(
                        .name,
                        .warn,
                        there: hosts.compactMap(\.host).joined(separator: " "),
                        message:
                            "'\(target.host)' is not where the question came from (\(source?.host ?? "not known"))",
                        remedy: "name the host's migration address in /etc/hosts"
                    )
                ]
            }
            let way = ControlConnection.Peer(host: target.host, port: target.port, identity: peer.name)
            let found = await HostProbe(peer: way, credentials: credentials, loop: loop).controlPort()
            // Guests can leave; it is the way home that is not there.
            return found.map { finding in
                var finding = finding
                if finding.result == .fail { finding.result = .warn }
                finding.message = finding.message.map { "The way back: \($0)" }
                return finding
            }
        }
        return found ?? []
    }

    // MARK: guests

    private func rehearse(
        _ guest: String,
        _ target: EvacuationOrder.Target,
        _ credentials: any TLSCredentials
    ) async -> [Finding] {
        say("rehearsing guest '\(guest)' with \(target)")
        let data = EventLoopGroup(name: "data")
        defer { data.stop() }
        var plan = MigrationPlan(
            id: MigrationStore.makeID(),
            guest: guest,
            host: target.host,
            port: target.port,
            stateDirectory: order.host.stateDirectory
        )
        plan.isRehearsal = true
        let warnings = Guarded<[String]>([])
        let migration = OutgoingMigration(plan: plan, credentials: credentials, loop: loop, dataLoops: data) { event in
            if event.event == "warning", let text = event.message { warnings.withLock { $0.append(text) } }
        }
        do {
            let report = try await migration.start()
            return await GuestFindings(report, warnings.withLock { $0 }, plan).findings
                + announcement(guest)
        } catch { return [Finding(.rehearsal, .fail, message: "\(error)", guest: guest)] }
    }

    /// How often QEMU tells the network where the guest is.
    private func announcement(_ guest: String) async -> [Finding] {
        let guests = GuestStore(stateDirectory: order.host.stateDirectory)
        let loop = loop
        let found: [Finding]? = try? await loop.run {
            guard let record = (try? guests.load(guest)) ?? nil, record.process?.isRunning == true,
                let monitor = try? await guests.connect(to: record, on: loop)
            else { return [] }
            defer { monitor.close() }
            let rounds = try? await monitor.execute("query-migrate-parameters")["announce-rounds"]?.integer
            guard let rounds = rounds ?? nil else { return [] }
            return [
                Finding(
                    .announcement,
                    rounds == 0 ? .warn : .ok,
                    here: "\(rounds) rounds",
                    message: rounds == 0 ? "QEMU tells no switch where the guest is after the move" : nil,
                    remedy: rounds == 0 ? "QMP: migrate-set-parameters announce-rounds=5" : nil,
                    guest: guest
                )
            ]
        }
        return found ?? []
    }

    // MARK: one table

    /// Both sides' findings; what is well on both is one row with both values.
    static func merged(_ own: [Finding], _ theirs: [Finding]) -> [Finding] {
        Check.allCases.flatMap { check -> [Finding] in
            let (here, there) = (own.filter { $0.check == check }, theirs.filter { $0.check == check })
            guard here.count == 1, there.count == 1, let one = here.first, let other = there.first,
                min(one.result, other.result) == .ok
            else { return here + there }
            var row = one.result >= other.result ? one : other
            (row.here, row.there) = (one.here, other.there)
            return [row]
        }
    }
}
