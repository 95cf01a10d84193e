internal import Emulator
internal import IO
internal import Migration
public import TLS

/// Brings home what an evacuation of this host moved away: the hosts that have the guests are asked to send them back.
///
/// They decide, by their own policy, and their own source agents do the work; this host only asks, and waits for what comes.
public struct Homecoming: Sendable {
    /// What became of a guest, or would.
    public struct Guest: Sendable, Codable, Hashable {
        /// Where it stands.
        public enum State: String, Sendable, Codable {
            /// It may come: only asked about.
            case mayCome = "may-come"
            /// It may come later: its host says why not now.
            case waiting
            /// It was asked for and is on its way.
            case coming
            /// It is here.
            case home
            /// It stays where it is.
            case away
        }
        /// Its name.
        public var name: String
        /// The host that has it.
        public var host: String
        /// Where it stands.
        public var state: State
        /// Why it stays away, or waits.
        public var reason: String?

        init(name: String, host: String, state: State, reason: String?) {
            self.name = name
            self.host = host
            self.state = state
            self.reason = reason
        }

        /// One that stays away because its host could not be asked.
        public init(away name: String, on host: EvacuationOrder.Target, reason: String) {
            self.init(name: name, host: "\(host)", state: .away, reason: reason)
        }
    }

    private let stateDirectory: String
    private let address: String
    private let skipped: Set<String>
    private let networks: [String: String]?
    private let onlyAsks: Bool
    private let credentials: @Sendable (EvacuationOrder.Target) throws -> any TLSCredentials
    private let say: @Sendable (Guest) -> Void

    /// How often is looked for what comes.
    private static let interval = Duration.seconds(1)
    /// For how long guests are asked for that may come later only, when nothing happens; and when it is told that they wait.
    private static let (patience, quiet) = (Duration.seconds(600), Duration.seconds(5))

    /// Describes a homecoming.
    ///
    /// - Parameters:
    ///   - stateDirectory: this host's.
    ///   - address: where the agent of this host is reached by the others, `HOST[:PORT]`; its certificate must be for that host.
    ///   - skipped: guests that stay away.
    ///   - networks: the bridges of this host, by the bridges and taps of the guests where they are; nil for none.
    ///   - onlyAsks: whether nothing is to be moved.
    ///   - selection: the credentials.
    ///   - directory: what relative paths among them begin from.
    ///   - say: is told of each change.
    public init(
        stateDirectory: String,
        address: String,
        skipping skipped: [String],
        networks: [String: String]? = nil,
        onlyAsks: Bool,
        credentials selection: CredentialSelection,
        directory: String,
        say: @escaping @Sendable (Guest) -> Void
    ) {
        self.stateDirectory = stateDirectory
        self.address = address
        self.skipped = Set(skipped)
        self.networks = networks
        self.onlyAsks = onlyAsks
        self.say = say
        credentials = { target in
            let plan = MigrationPlan(
                id: "",
                guest: "",
                host: target.host,
                port: target.port,
                stateDirectory: stateDirectory
            )
            return try SourceAgentOrder(plan: plan, credentials: selection, directory: directory).credentials()
        }
    }

    /// The hosts to which evacuations of this host have moved guests that are not here, with their guests.
    ///
    /// - Throws: `JournalError` when nobody knows whose a guest is.
    public func whereabouts() throws -> [EvacuationOrder.Target: [String]] {
        let files = EvacuationFiles(stateDirectory: stateDirectory)
        var places: [String: EvacuationOrder.Target] = [:]
        for id in files.ids {
            // A plan that cannot be read says nothing about where a guest is.
            for guest in ((try? files.load(id)) ?? nil)?.guests ?? [] {
                if case .moved(_, let target) = guest.standing { places[guest.name] = target }
            }
        }
        var hosts: [EvacuationOrder.Target: [String]] = [:]
        for (guest, target) in places where try isAway(guest) { hosts[target, default: []].append(guest) }
        return hosts.mapValues { $0.sorted() }
    }

    /// Whether a guest that has left may be expected back: one that came home is not, whatever became of it here.
    private func isAway(_ guest: String) throws -> Bool {
        try !isHere(guest) && !MigrationStore(stateDirectory: stateDirectory).hasArrived(guest)
    }

    /// Whether a guest belongs to this host.
    private func isHere(_ guest: String) throws -> Bool {
        guard let record = try GuestStore(stateDirectory: stateDirectory).load(guest), record.released == nil else {
            return false
        }
        return try MigrationStore(stateDirectory: stateDirectory).startBar(of: guest) == nil
    }

    /// Asks one host for guests, and waits until each is here or stays away.
    ///
    /// - Parameters:
    ///   - host: whom to ask.
    ///   - guests: which; nil for all that are at home here.
    /// - Returns: what became of each.
    /// - Throws: `MigrationError` when the host cannot be asked, or sends nothing back.
    public func bring(from host: EvacuationOrder.Target, _ guests: [String]?) async throws -> [Guest] {
        let loop = EventLoop(name: "restore")
        defer { loop.stop() }
        let target = TargetHost(
            host,
            evacuation: MigrationStore.makeID(),
            credentials: try credentials(host),
            on: loop
        )
        defer { target.close() }
        var found: [String: Guest] = [:]
        func set(_ name: String, _ state: Guest.State, _ reason: String? = nil) {
            let guest = Guest(name: name, host: "\(host)", state: state, reason: reason)
            if found.updateValue(guest, forKey: name) != guest { say(guest) }
        }
        // What the host has is asked first: only what it names is asked for.
        var waiting: [String] = []
        for answer in try await ask(target, host, guests, isQuestion: true) where !skipped.contains(answer.guest) {
            if let reason = answer.reason, !answer.isLater {
                set(answer.guest, .away, reason)
            } else {
                waiting.append(answer.guest)
                if onlyAsks { set(answer.guest, .mayCome) }
            }
        }
        if onlyAsks { return found.values.sorted { $0.name < $1.name } }
        var coming: Set<String> = []
        var changed = ContinuousClock.now
        while !waiting.isEmpty || !coming.isEmpty {
            if !waiting.isEmpty {
                for answer in try await ask(target, host, waiting, isQuestion: false) {
                    if answer.isLater {
                        let time = ContinuousClock.now - changed
                        if !coming.isEmpty || time < Self.quiet { continue }
                        guard time >= Self.patience else {
                            set(answer.guest, .waiting, answer.reason)
                            continue
                        }
                        waiting.removeAll { $0 == answer.guest }
                        let reason = answer.reason ?? "its host said nothing of why"
                        set(
                            answer.guest,
                            .away,
                            "it was asked for for \(Self.patience.components.seconds / 60) minutes: \(reason)"
                        )
                        continue
                    }
                    changed = .now
                    waiting.removeAll { $0 == answer.guest }
                    if let reason = answer.reason {
                        set(answer.guest, .away, reason)
                    } else {
                        coming.insert(answer.guest)
                        set(answer.guest, .coming)
                    }
                }
            }
            try await Task.sleep(for: Self.interval)
            for guest in coming where try isHere(guest) {
                coming.remove(guest)
                changed = .now
                set(guest, .home)
            }
            if coming.isEmpty { continue }
            // One that may be asked for again is not on its way any more.
            for answer in try await ask(target, host, coming.sorted(), isQuestion: true) where !answer.isLater {
                guard try !isHere(answer.guest) else { continue }
                coming.remove(answer.guest)
                changed = .now
                let failure = answer.lastFailure.map { "it was sent and did not arrive: \($0)" }
                set(
                    answer.guest,
                    .away,
                    answer.reason ?? failure
                        ?? "it was sent and did not arrive; the log of the agent on \(host), or 'crossdock status' there, says why"
                )
            }
        }
        return found.values.sorted { $0.name < $1.name }
    }

    private func ask(
        _ target: TargetHost,
        _ host: EvacuationOrder.Target,
        _ guests: [String]?,
        isQuestion: Bool
    ) async throws -> [HostMessage.Recalled] {
        var recall = HostMessage.Recall(guests: guests, address: address, isQuestion: isQuestion)
        recall.networks = networks
        guard let answers = try await target.recall(recall) else {
            throw MigrationError(
                .refused,
                "The agent on \(host) is of an earlier release and sends no guests back; run 'crossdock migrate' there"
            )
        }
        // It speaks of what it was asked about.
        return answers.filter { answer in
            guests?.contains(answer.guest) ?? ((try? GuestStore.validate(answer.guest)) != nil)
        }
    }
}
