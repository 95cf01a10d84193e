internal import Emulator
internal import IO
internal import Migration
internal import TLS

/// The look at a host before its first guest moves: who is there, who fits where, and what keeps the others.
///
/// Every guest is rehearsed with every target. Nothing is changed, on either side.
public struct EvacuationSurvey: Sendable {
    /// What is said of one guest, or of a QEMU that is none.
    public struct Row: Sendable, Codable {
        /// The guest.
        public var guest: String
        /// Where it would go; nil when it does not go.
        public var target: String?
        /// Bytes of its disks that are in use.
        public var disk: UInt64?
        /// Bytes of its memory.
        public var memory: UInt64?
        /// Bytes that it changes in a second, in memory and on disks.
        public var writes: Double?
        /// How long its copy would take, in seconds; nil when it may not converge.
        public var seconds: Double?
        /// The pause that is aimed at, in milliseconds; nil for a guest that does not run.
        public var pauseMS: Int?
        /// Why it does not go, with the remedy.
        public var reason: String?
        /// Whether it stays because the operator wants it so: it keeps nobody from beginning.
        public var isWanted = false

        private enum CodingKeys: String, CodingKey {
            case guest, target, disk, memory, writes, seconds, reason
            case pauseMS = "pause_ms"
            case isWanted = "is_wanted"
        }
    }

    /// The guests, in the order in which they would be moved, and then what stays.
    public private(set) var rows: [Row] = []
    /// The plan.
    public private(set) var evacuation: Evacuation
    /// What is worth a look and stops nothing.
    public private(set) var warnings: [String] = []

    /// The guests that cannot go although they should.
    public var obstacles: [Row] { rows.filter { $0.reason != nil && !$0.isWanted } }
    /// Whether the evacuation may begin.
    public var mayBegin: Bool { obstacles.isEmpty || evacuation.order.startsAnyway }

    /// How many blank copies are under way at once.
    private static let rehearsals = 3
    /// How many guests are looked at at once; each is watched for a second, which takes next to nothing.
    private static let looks = 12

    /// Looks at this host and at the targets.
    ///
    /// - Parameters:
    ///   - order: what is wanted.
    ///   - id: the evacuation's.
    ///   - say: is told what is being done, a sentence each.
    /// - Throws: `MigrationError` for a selection that makes no sense, a target that cannot be asked, or an evacuation under way.
    public static func take(
        _ order: EvacuationOrder,
        id: String,
        began: Int,
        say: @escaping @Sendable (String) -> Void
    ) async throws -> EvacuationSurvey {
        let (loop, data) = (EventLoop(name: "survey"), EventLoopGroup(name: "data"))
        defer {
            loop.stop()
            data.stop()
        }
        let state = order.migration.stateDirectory
        let inventory = try await BlockingPool.shared.run {
            try Inventory(stateDirectory: state, knownOnly: order.knownOnly)
        }
        let selection = try Selection(order, inventory)
        let credentials = try order.agent("", to: order.targets[0], migration: id) { _ in }.credentials()
        let targets = try await askTargets(order, id, credentials, loop)
        var survey = EvacuationSurvey(
            evacuation: Evacuation(id: id, began: began, order: order, guests: [], staying: [:])
        )
        survey.warnings = targets.compactMap(\.warning)
        let found = try await rehearse(selection.moving, targets, order, credentials, (loop, data), say)
        survey.conclude(selection, targets, found, order, id, began)
        return survey
    }

    private init(evacuation: Evacuation) { self.evacuation = evacuation }

    // MARK: The targets

    private struct Target: Sendable {
        var target: EvacuationOrder.Target
        var state: HostState?
        var warning: String?
    }

    private static func askTargets(
        _ order: EvacuationOrder,
        _ id: String,
        _ credentials: any TLSCredentials,
        _ loop: EventLoop
    ) async throws -> [Target] {
        var targets: [Target] = []
        let directory = order.migration.stateDirectory
        for target in order.targets {
            let host = TargetHost(
                target,
                evacuation: id,
                credentials: credentials,
                on: loop
            )
            defer { host.close() }
            let state = try await host.state()
            if let mark = state?.mark {
                // This host's own agent has a mark once it has answered.
                guard try await BlockingPool.shared.run({ try HostMark.read(stateDirectory: directory) }) != mark else {
                    throw MigrationError(
                        .guest,
                        "\(target) is this host itself; name the hosts that its guests are to go to"
                    )
                }
                if let other = targets.first(where: { $0.state?.mark == mark }) {
                    throw MigrationError(.guest, "\(target) and \(other.target) are the same host; name it once")
                }
            }
            if let cordon = state?.cordon {
                throw MigrationError(.refused, "\(target) takes no guests: \(MigrationContext.said(cordon))")
            }
            let warning =
                state == nil
                ? "The agent on \(target) is of an earlier release: it keeps no room for guests that are on their way, and takes no turns"
                : nil
            targets.append(Target(target: target, state: state, warning: warning))
        }
        return targets
    }

    // MARK: Rehearsals

    /// What the rehearsal of a guest with a target said.
    private struct Finding: Sendable {
        var target: Int
        var report: MigrationReport
    }

    private static func rehearse(
        _ guests: [Inventory.Guest],
        _ targets: [Target],
        _ order: EvacuationOrder,
        _ credentials: any TLSCredentials,
        _ loops: (control: EventLoop, data: EventLoopGroup),
        _ say: @escaping @Sendable (String) -> Void
    ) async throws -> [String: [Finding]] {
        /// Rehearses a guest with every target. The lines to them need be measured once, and the guest watched once.
        let places = KeyedSemaphore(limit: rehearsals)
        @Sendable func look(_ guest: Inventory.Guest, _ lines: [RehearsedFigures]) async throws -> [Finding] {
            var found: [Finding] = []
            for (index, target) in targets.enumerated() {
                say("rehearsing guest '\(guest.name)' with \(target.target)")
                let agent = order.agent(guest.name, to: target.target, migration: MigrationStore.makeID()) {
                    $0.isRehearsal = true
                }
                var known = lines[index]
                for earlier in found { known.takeActivity(from: earlier.report) }
                let migration = OutgoingMigration(
                    plan: agent.plan,
                    credentials: credentials,
                    loop: loops.control,
                    dataLoops: loops.data,
                    known: known,
                    rehearsalTurn: try await loops.control.run { places.request("") }
                ) { _ in }
                found.append(Finding(target: index, report: try await migration.start()))
            }
            return found
        }
        guard let first = guests.first else { return [:] }
        // Nobody else is on the lines while they are measured.
        var lines = targets.map { _ in RehearsedFigures() }
        let found = try await look(first, lines)
        for finding in found { lines[finding.target].takeLine(from: finding.report) }
        return try await withThrowingTaskGroup(of: (String, [Finding]).self) { [lines] group in
            var findings = [first.name: found]
            var waiting = guests.dropFirst()
            func next() {
                guard let guest = waiting.popFirst() else { return }
                group.addTask { (guest.name, try await look(guest, lines)) }
            }
            for _ in 0..<looks { next() }
            while let (name, found) = try await group.next() {
                findings[name] = found
                next()
            }
            return findings
        }
    }

    // MARK: The table

    private mutating func conclude(
        _ selection: Selection,
        _ targets: [Target],
        _ found: [String: [Finding]],
        _ order: EvacuationOrder,
        _ id: String,
        _ began: Int
    ) {
        func best(_ name: String) -> MigrationReport.Rehearsal? {
            let findings = found[name] ?? []
            return
                (findings.first { $0.report.outcome == .rehearsed } ?? findings.first { $0.report.rehearsal != nil })?
                .report.rehearsal
        }
        let placed = Placement.propose(
            selection.moving.map { guest in
                let rehearsal = best(guest.name)
                return Placement.Guest(
                    name: guest.name,
                    memory: rehearsal?.memoryBytes ?? 0,
                    disk: rehearsal?.diskBytes ?? 0,
                    group: guest.placement.antiAffinity,
                    fits: (found[guest.name] ?? []).filter { $0.report.outcome == .rehearsed }.map(\.target)
                )
            },
            on: targets.map { target in
                Placement.Host(
                    name: "\(target.target)",
                    memory: target.state.map { min($0.unpromisedMemory, $0.allowance.memory ?? .max) },
                    disk: target.state.map { min($0.unpromisedDisk, $0.allowance.disk ?? .max) },
                    guests: target.state?.allowance.guests,
                    groups: target.state?.groups ?? [:]
                )
            },
            order.ignoresAffinity ? .ignored : .kept
        )
        var guests: [Evacuation.Guest] = []
        var staying: [String: String] = selection.staying
        for guest in selection.ordered(
            by: order.sequence,
            size: { name in
                best(name).map { $0.memoryBytes.addingSaturated($0.diskBytes) } ?? 0
            }
        ) {
            let rehearsal = best(guest.name)
            var row = Row(guest: guest.name)
            row.memory = rehearsal?.memoryBytes
            row.disk = rehearsal?.diskBytes
            row.seconds = rehearsal?.secondsEstimated
            row.pauseMS = order.migration.downtimeLimit
            if let memory = rehearsal?.memoryDirtyRate { row.writes = memory + (rehearsal?.diskWriteRate ?? 0) }
            switch placed[guest.name] {
            case .hosts(let hosts)?:
                row.target = "\(targets[hosts[0]].target)"
                var entry = Evacuation.Guest(
                    name: guest.name,
                    memory: rehearsal?.memoryBytes ?? 0,
                    disk: rehearsal?.diskBytes ?? 0,
                    processors: (try? guest.record.commandLine.processors()) ?? 1,
                    group: guest.placement.antiAffinity,
                    targets: hosts.map { targets[$0].target }
                )
                entry.diskAtMost = rehearsal?.diskBytesAtMost ?? 0
                entry.seconds = rehearsal?.secondsEstimated
                entry.stops = guest.isRunning && guest.placement.evacuation == .stop
                if entry.stops || !guest.isRunning { row.pauseMS = nil }
                guests.append(entry)
            case .none(let reason)?:
                let refusals = (found[guest.name] ?? []).compactMap { $0.report.reason }
                row.reason = refusals.isEmpty ? reason : Self.distinct(refusals).joined(separator: "; ")
                staying[guest.name] = row.reason
            case nil: continue
            }
            rows.append(row)
        }
        for (name, reason) in staying.sorted(by: { $0.key < $1.key }) where !rows.contains(where: { $0.guest == name })
        {
            rows.append(Row(guest: name, reason: reason, isWanted: selection.wanted.contains(name)))
        }
        warnings += Self.refusals(of: targets, of: guests.map(\.name), found)
        evacuation = Evacuation(id: id, began: began, order: order, guests: guests, staying: staying)
    }

    /// Which targets do not take guests that go to another one, and why.
    private static func refusals(of targets: [Target], of guests: [String], _ found: [String: [Finding]]) -> [String] {
        targets.enumerated().flatMap { index, target in
            var reasons: [(reason: String, guests: [String])] = []
            for guest in guests {
                guard let finding = found[guest]?.first(where: { $0.target == index }),
                    finding.report.outcome != .rehearsed,
                    // The sentence names the guest; what was found against it is the same of many.
                    let reason = finding.report.obstacles?.map(\.reason).joined(separator: "; ")
                        ?? finding.report.reason
                else { continue }
                if let known = reasons.firstIndex(where: { $0.reason == reason }) {
                    reasons[known].guests.append(guest)
                } else {
                    reasons.append((reason, [guest]))
                }
            }
            return reasons.map { "\(target.target) does not take \($0.guests.joined(separator: ", ")): \($0.reason)" }
        }
    }

    private static func distinct(_ texts: [String]) -> [String] {
        var seen: Set<String> = []
        return texts.filter { seen.insert($0).inserted }
    }
}

/// Which of what is on a host an evacuation is about.
private struct Selection {
    /// Those that are to move.
    var moving: [Inventory.Guest] = []
    /// Those that stay, with the reason; also strangers.
    var staying: [String: String] = [:]
    /// Those of them that stay because the operator wants it so.
    var wanted: Set<String> = []

    /// - Throws: `MigrationError` when a guest or a label is named that is not there.
    init(_ order: EvacuationOrder, _ inventory: Inventory) throws {
        let names = inventory.guests.map(\.name) + inventory.strangers.map(\.name)
        for name in order.leave where !names.contains(name) {
            throw MigrationError(
                .guest,
                "There is no guest '\(name)' on this host to be left; there are: \(names.joined(separator: ", "))"
            )
        }
        for selector in order.only + order.except
        where !inventory.guests.contains(where: { Self.matches(selector, $0) }) {
            switch selector {
            case .guest(let name) where inventory.strangers.contains { $0.name == name }: continue
            case .guest(let name):
                throw MigrationError(
                    .guest,
                    "There is no guest '\(name)' on this host"
                        + (names.isEmpty ? "" : "; there are: \(names.joined(separator: ", "))")
                )
            case .label(let key, let value):
                throw MigrationError(
                    .guest,
                    "No guest on this host has the label \(key)=\(value); 'crossdock guest set GUEST --label \(key)=\(value)' sets it"
                )
            }
        }
        for guest in inventory.guests {
            guard Self.isMeant(guest, order) else { continue }
            if order.leave.contains(guest.name) || guest.placement.evacuation == .leave {
                staying[guest.name] =
                    order.leave.contains(guest.name)
                    ? "it is left, as was asked for" : "it is set to stay (--evacuate leave)"
                wanted.insert(guest.name)
            } else if let obstacle = guest.obstacle ?? Self.obstacle(guest, order) {
                staying[guest.name] = obstacle
            } else {
                moving.append(guest)
            }
        }
        for stranger in inventory.strangers {
            if !order.only.isEmpty || order.except.contains(.guest(stranger.name)) { continue }
            staying[stranger.name] =
                "\(stranger.manager.map { "a guest of \($0)" } ?? "a QEMU that is not known here"), process \(stranger.process): "
                + stranger.remedy
            if stranger.manager != nil || order.leave.contains(stranger.name) { wanted.insert(stranger.name) }
        }
    }

    /// What keeps a guest that this host may move.
    private static func obstacle(_ guest: Inventory.Guest, _ order: EvacuationOrder) -> String? {
        guard guest.placement.evacuation == .stop, guest.isRunning, !order.mayStop else { return nil }
        return "it is set to be stopped for a move (--evacuate stop); --stop-ok permits that"
    }

    private static func isMeant(_ guest: Inventory.Guest, _ order: EvacuationOrder) -> Bool {
        if order.except.contains(where: { matches($0, guest) }) { return false }
        return order.only.isEmpty || order.only.contains { matches($0, guest) }
    }

    private static func matches(_ selector: EvacuationOrder.Selector, _ guest: Inventory.Guest) -> Bool {
        switch selector {
        case .guest(let name): guest.name == name
        case .label(let key, let value): guest.placement.labels[key] == value
        }
    }

    /// The guests that move, the first first.
    func ordered(by sequence: EvacuationOrder.Sequence, size: (String) -> UInt64) -> [Inventory.Guest] {
        moving.sorted { one, other in
            let (left, right) = (size(one.name), size(other.name))
            let (high, low) = (one.placement.priority ?? 0, other.placement.priority ?? 0)
            switch sequence {
            case .largest where left != right: return left > right
            case .smallest where left != right: return left < right
            case .priority where high != low: return high > low
            case .priority where left != right: return left > right
            default: return one.name < other.name
            }
        }
    }
}
