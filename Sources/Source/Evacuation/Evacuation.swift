internal import IO
public import Migration

/// The plan of an evacuation and how far it is: a value that says what is to be done next, and does nothing itself.
///
/// It is written durably before each step. What became of a migration it is told by whoever read that migration's journal; it never
/// concludes it from what it had begun.
public struct Evacuation: Sendable, Codable {
    /// Where a guest stands.
    public enum Standing: Sendable, Hashable, Codable {
        /// Nothing was begun.
        case planned
        /// A migration was begun, or is about to be.
        case moving(migration: String, target: EvacuationOrder.Target)
        /// It did not go well, and is tried again at this time (seconds since 1970).
        case waiting(until: Int, reason: String)
        /// It belongs to the other host.
        case moved(migration: String, target: EvacuationOrder.Target)
        /// It was released and the other host has not answered: nobody may start it elsewhere.
        case undecided(migration: String, target: EvacuationOrder.Target)
        /// It stays on this host.
        case stays(reason: String)

        /// Whether nothing more happens to it.
        public var isOver: Bool {
            switch self {
            case .planned, .moving, .waiting: false
            case .moved, .undecided, .stays: true
            }
        }
    }

    /// A guest of the plan.
    public struct Guest: Sendable, Codable {
        /// Its name.
        public var name: String
        /// Bytes of memory.
        public var memory: UInt64
        /// Bytes of disk that are in use.
        public var disk: UInt64
        /// Bytes of its disks and files if all of them were in use.
        public var diskAtMost: UInt64 = 0
        /// Processors.
        public var processors: UInt64
        /// Those that share a group are kept apart; nil for none.
        public var group: String?
        /// The targets that it fits on, the preferred first.
        public var targets: [EvacuationOrder.Target]
        /// How long the migration was estimated to take, in seconds; nil when it might not converge.
        public var seconds: Double?
        /// Whether it is shut down before it moves.
        public var stops = false
        /// Where it stands.
        public var standing = Standing.planned
        /// Migrations that did not go well.
        public var failures = 0
        /// The targets that have refused it, with their reasons.
        public var refusals: [EvacuationOrder.Target: String] = [:]
        /// The pause, in milliseconds, when it has moved.
        public var blackoutMS: Double?

        /// Describes a guest.
        public init(
            name: String,
            memory: UInt64,
            disk: UInt64,
            processors: UInt64 = 1,
            group: String? = nil,
            targets: [EvacuationOrder.Target]
        ) {
            self.name = name
            self.memory = memory
            self.disk = disk
            self.processors = processors
            self.group = group
            self.targets = targets
        }
    }

    /// Why no guest is begun any more.
    public enum Ending: String, Sendable, Hashable, Codable {
        /// The operator has cancelled it.
        case cancelled
        /// Its time is over.
        case deadline
        /// A guest could not be moved, and `--on-failure stop` was asked for.
        case failure
    }

    /// What a migration is doing, as far as others have to know.
    public enum Phase: Sendable, Hashable {
        /// Both sides are looked at; then it waits for a place to copy, if all are taken.
        case preparing
        /// Its disks are copied: it has one of the places for that.
        case copying
        /// Its copy is nearly through: the next guest may get ready, so that the line has something to carry when the place is free.
        case ending
        /// Its disks are there and are proved.
        case verifying
        /// It has converged, and waits for its turn, or has it.
        case switching
    }

    /// How a migration has ended.
    public enum Outcome: Sendable {
        /// The guest belongs to the other host.
        case migrated(blackoutMS: Double?)
        /// The guest belongs to this host.
        case failed(code: MigrationError.Code, reason: String)
        /// Nobody knows yet.
        case undecided
        /// It was not even begun.
        case notBegun
    }

    /// What is to be done.
    public enum Step: Sendable, Hashable {
        /// Reserve room, and begin a migration.
        case begin(guest: String, target: EvacuationOrder.Target)
        /// Ask a migration for a roll-back; it may be too late for that.
        case giveUp(guest: String, migration: String)
    }

    /// How often a guest is tried again.
    public static let attempts = 3
    /// How long it is left alone before that, in seconds; twice as long each time.
    static let pause = 5
    /// How many guests may be copied and wait, with the one that has its turn: they pay for every write.
    static let waiting = 2
    /// How much of a copy may be left, in seconds, when the next guest gets ready.
    public static let headStart = 8.0

    /// The form of the file.
    public private(set) var version = 1
    /// Its id.
    public let id: String
    /// When it began, in seconds since 1970.
    public let began: Int
    /// What was asked for.
    public let order: EvacuationOrder
    /// The guests, in the order in which they are begun.
    public private(set) var guests: [Guest]
    /// What had a reason to stay from the start, with it; these count as left.
    public let staying: [String: String]
    /// Why nothing is begun any more.
    public private(set) var ending: Ending?
    /// What the migrations under way are doing. It is seen again by whoever goes on.
    private var phases: [String: Phase] = [:]
    /// Migrations that were asked to give up.
    private var givenUp: Set<String> = []

    private enum CodingKeys: String, CodingKey {
        case version, id, began, order, guests, staying, ending
    }

    /// Makes a plan.
    public init(
        id: String,
        began: Int,
        order: EvacuationOrder,
        guests: [Guest],
        staying: [String: String] = [:]
    ) {
        self.id = id
        self.began = began
        self.order = order
        self.guests = guests
        self.staying = staying
    }

    /// Reads a plan; nil when it is none, or of another version.
    public init?(parsing bytes: [UInt8]) {
        guard let plan = JSONText.decode(Evacuation.self, from: bytes), plan.version == 1 else { return nil }
        self = plan
    }

    /// The plan as it is written.
    public func encoded() throws -> [UInt8] { Array(try JSONText.encode(self, pretty: true)) }

    /// Those that the operator has left out of it: they do not count.
    var ignored: Set<String> {
        Set(order.except.compactMap { if case .guest(let name) = $0 { name } else { nil } })
    }

    /// Whether nothing is left to do.
    public var isOver: Bool {
        if ending == nil { return guests.allSatisfy(\.standing.isOver) }
        return !guests.contains { if case .moving = $0.standing { true } else { false } }
    }

    /// The exit code: 0 when every guest has moved, 20 when some are left, 22 after the deadline, 23 after a cancellation.
    public var code: Int32 {
        let isEmpty =
            staying.isEmpty
            && guests.allSatisfy { if case .moved = $0.standing { true } else { false } }
        if isEmpty { return 0 }
        switch ending {
        case .cancelled: return 23
        case .deadline: return 22
        case .failure, nil: return 20
        }
    }

    /// When something has to be done although nothing happens; nil for never.
    public var nextTime: Int? {
        guard ending == nil else { return nil }
        let waits = guests.compactMap { if case .waiting(let until, _) = $0.standing { until } else { nil } }
        return (waits + [order.deadline].compactMap { $0 }).min()
    }

    // MARK: What is to be done

    /// What is to be done now. A step that was carried out is told with `begun` or `ended`; until then it is asked for again.
    public mutating func due(at now: Int) -> [Step] {
        if let deadline = order.deadline, deadline <= now, ending == nil, !isOver { ending = .deadline }
        var steps: [Step] = []
        if ending == .cancelled || ending == .deadline {
            for guest in guests {
                guard case .moving(let migration, _) = guest.standing, let phase = phases[guest.name],
                    phase != .switching, givenUp.insert(migration).inserted
                else { continue }
                steps.append(.giveUp(guest: guest.name, migration: migration))
            }
        }
        guard ending == nil else { return steps }
        var copying = phases.values.count { $0 == .preparing || $0 == .copying }
        let copied = phases.values.count { $0 == .verifying || $0 == .switching }
        for index in guests.indices where copying < order.parallelCopies && copied < Self.waiting {
            switch guests[index].standing {
            case .planned: break
            case .waiting(let until, _) where until <= now: break
            default: continue
            }
            guard let target = target(guests[index], besides: steps) else {
                guests[index].standing = .stays(reason: refusal(guests[index]))
                continue
            }
            steps.append(.begin(guest: guests[index].name, target: target))
            copying += 1
        }
        return steps
    }

    /// Where a guest goes next: the first target that has not refused it, and another one than last time after a failure.
    private func target(_ guest: Guest, besides steps: [Step]) -> EvacuationOrder.Target? {
        let open = guest.targets.filter { guest.refusals[$0] == nil && !meets(guest, on: $0, steps) }
        return open.isEmpty ? nil : open[guest.failures % open.count]
    }

    /// Whether one of its group is there, or on its way there.
    private func meets(_ guest: Guest, on target: EvacuationOrder.Target, _ steps: [Step]) -> Bool {
        guard let group = guest.group, !order.ignoresAffinity else { return false }
        return guests.contains { other in
            guard other.name != guest.name, other.group == group else { return false }
            if steps.contains(.begin(guest: other.name, target: target)) { return true }
            switch other.standing {
            case .moving(_, let there), .moved(_, let there), .undecided(_, let there): return there == target
            case .planned, .waiting, .stays: return false
            }
        }
    }

    private func refusal(_ guest: Guest) -> String {
        let reasons = guest.targets.map { target in
            "\(target): \(guest.refusals[target] ?? "another guest of the group '\(guest.group ?? "")' is there, from which it is kept apart")"
        }
        return reasons.isEmpty ? "there is no host that it fits on" : reasons.joined(separator: "; ")
    }

    // MARK: What happened

    /// A migration is about to be begun; to be written before it is.
    public mutating func begun(_ guest: String, migration: String, target: EvacuationOrder.Target) {
        change(guest) { $0.standing = .moving(migration: migration, target: target) }
        phases[guest] = .preparing
    }

    /// A target has no room for a guest, or wants none.
    public mutating func refused(_ guest: String, by target: EvacuationOrder.Target, reason: String) {
        change(guest) {
            $0.refusals[target] = reason
            $0.standing = .planned
        }
        phases[guest] = nil
    }

    /// What a migration is doing.
    ///
    /// - Returns: whether that is news.
    @discardableResult
    public mutating func entered(_ guest: String, _ phase: Phase) -> Bool {
        guard let former = phases[guest], former != phase else { return false }
        phases[guest] = phase
        return true
    }

    /// Whoever takes up a plan has found the migration of a guest under way.
    public mutating func found(_ guest: String, _ phase: Phase) {
        guard let entry = guests.first(where: { $0.name == guest }), case .moving = entry.standing else { return }
        phases[guest] = phase
    }

    /// A migration has ended.
    public mutating func ended(_ guest: String, _ outcome: Outcome, at now: Int) {
        phases[guest] = nil
        let late = ending == .deadline ? givenUp : []
        change(guest) { entry in
            guard case .moving(let migration, let target) = entry.standing else { return }
            switch outcome {
            case .migrated(let blackout):
                entry.standing = .moved(migration: migration, target: target)
                entry.blackoutMS = blackout
            case .undecided: entry.standing = .undecided(migration: migration, target: target)
            case .notBegun: entry.standing = .planned
            case .failed(.cancelled, _) where late.contains(migration):
                Self.fail(&entry, .cancelled, "the deadline was over before it could be paused", target, now)
            case .failed(let code, let reason): Self.fail(&entry, code, reason, target, now)
            }
        }
        guard order.onFailure == .stop, ending == nil,
            let entry = guests.first(where: { $0.name == guest })
        else { return }
        switch entry.standing {
        case .undecided, .stays: ending = .failure
        case .planned, .moving, .waiting, .moved: break
        }
    }

    private static func fail(
        _ entry: inout Guest,
        _ code: MigrationError.Code,
        _ reason: String,
        _ target: EvacuationOrder.Target,
        _ now: Int
    ) {
        switch code {
        // Asked for by this plan, or by somebody who does not want this guest to move.
        case .cancelled: entry.standing = .stays(reason: reason)
        // The guest itself is in the way, or this host's credentials are: no other host changes that.
        case .guest, .security: entry.standing = .stays(reason: reason)
        case .refused:
            entry.refusals[target] = reason
            entry.standing = .planned
        case .failed, .unreachable, .notConverged, .undecided, .busy, .mismatch:
            entry.failures += 1
            entry.standing =
                entry.failures >= attempts
                ? .stays(reason: reason)
                : .waiting(until: now + pause << (entry.failures - 1), reason: reason)
        }
    }

    /// No guest is begun any more; what has not switched over is given up.
    public mutating func cancel() {
        if !isOver { ending = .cancelled }
    }

    private mutating func change(_ guest: String, _ body: (inout Guest) -> Void) {
        guard let index = guests.firstIndex(where: { $0.name == guest }) else { return }
        body(&guests[index])
    }
}

extension Evacuation.Phase {
    /// What a migration is doing that is in this phase of its own.
    init(of phase: String) {
        switch phase {
        case "check", "queue": self = .preparing
        case "disks": self = .copying
        case "verify": self = .verifying
        default: self = .switching
        }
    }
}
