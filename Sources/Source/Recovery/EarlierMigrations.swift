internal import Emulator
internal import IO
internal import Migration

/// Migrations of a guest whose agents ended before the release, and what they still owe their destinations: one that was asked to
/// prepare keeps its copy, and refuses the guest, until it is told.
struct EarlierMigrations {
    private let context: MigrationContext
    private let ids: [String]

    init(_ context: MigrationContext) {
        self.context = context
        ids = context.migrations.ids().filter { id in
            guard let reading = try? context.migrations.reading(of: id), reading.guest == context.plan.guest,
                case .source(let standing) = reading.standing
            else { return false }
            return standing.mayRunHere && !standing.isOver
        }
    }

    /// The latest of them.
    var latest: String? { ids.last }

    /// Tells each destination, and closes what was told. One that is away is told by `crossdock recover` later.
    ///
    /// - Throws: `MigrationError` when a destination has taken the guest; `JournalError`.
    func settle() async throws {
        for id in ids {
            let files = context.migrations.files(of: id)
            guard case .source(let standing) = try context.migrations.reading(of: id)?.standing else { continue }
            guard let order = try? SourceAgentOrder(reading: files.plan) else {
                // An agent that ended before it had an order has told nobody anything.
                try Journal(opening: files.journal).append(.rolledBack(reason: OutgoingMigration.superseded))
                continue
            }
            let context = context
            let earlier = OutgoingMigration(
                plan: order.plan,
                credentials: try order.credentials(),
                loop: context.loop,
                dataLoops: context.dataLoops
            ) { event in
                if let message = event.message { context.warn(message) }
            }
            try await earlier.settleDebt(standing)
        }
    }
}

extension OutgoingMigration {
    /// Tells the destination of a migration that was given up, without touching the guest, and closes it when that is known there.
    ///
    /// - Returns: whether it is known there.
    /// - Throws: `MigrationError` when an operator has taken the guest for the destination; `JournalError`.
    @discardableResult
    func settleDebt(_ standing: SourceStanding) async throws -> Bool {
        let journal = try Journal(opening: context.files.journal)
        if case .taken(let by) = standing {
            guard await tellOverruling(by: by) else { return false }
            try await journal.write(.rolledBack(reason: "\(by) has taken the guest for this host"))
            return true
        }
        switch await link.tell(Self.superseded, patience: .seconds(5)) {
        case .acknowledged:
            try await journal.write(.rolledBack(reason: Self.superseded))
            return true
        case .overruled(let by):
            // It stays open: 'crossdock recover' says what that means.
            throw DestinationLink.overruled(plan, by)
        case .silent:
            context.warn(
                "\(plan.host) could not be told that migration \(plan.id) was given up; it may keep its copy of guest '\(plan.guest)' "
                    + "and refuse the guest until 'crossdock recover \(plan.id)' has told it"
            )
            return false
        }
    }
}
