internal import Emulator
internal import Glibc
internal import IO
public import Migration
internal import TLS

/// The migrations of a host whose agents have ended: which need a hand, and what is done about each.
public struct Recovery: Sendable {
    /// The migrations.
    public let migrations: MigrationStore
    private let guests: GuestStore
    private let say: @Sendable (String) -> Void

    /// Makes the recovery of a state directory.
    ///
    /// - Parameters:
    ///   - stateDirectory: the directory.
    ///   - say: is told every sentence for people.
    public init(stateDirectory: String, say: @escaping @Sendable (String) -> Void) {
        migrations = MigrationStore(stateDirectory: stateDirectory)
        guests = GuestStore(stateDirectory: stateDirectory)
        self.say = say
    }

    /// The migrations about which something is left to do and nobody does it.
    public func pending() throws -> [String] { try migrations.ids().filter(isPending) }

    private func isPending(_ id: String) throws -> Bool {
        let reading: JournalReading?
        do { reading = try migrations.reading(of: id) } catch {
            say("\(error)")
            return false
        }
        guard let reading else { return false }
        switch reading.standing {
        case .source:
            guard OutgoingMigration.isUnfinished(id, reading, migrations, guests) else { return false }
            // A migration whose agent holds the guest's lock is at work; one that was killed lets go of it in a moment.
            let files = migrations.files(of: id)
            let end = ContinuousClock.now + .seconds(1)
            repeat {
                if try migrations.lock(guest: reading.guest) != nil { return true }
                usleep(20_000)
            } while MigrationFiles.Role.allCases.allSatisfy { files.running($0) == nil } && ContinuousClock.now < end
            return false
        case .destination(.prepared): return true
        case .destination: return false
        }
    }

    /// Ends a migration that started on this host and whose agent has ended, from what its journal says.
    ///
    /// A guest that was released belongs to the destination, which is asked until it answers.
    ///
    /// - Parameters:
    ///   - id: the migration.
    ///   - claim: an operator's word that the guest belongs to this host although it was released.
    ///   - reason: why its agent has ended, as a sentence; nil when that is not known.
    /// - Returns: the report; its code is the exit code of `crossdock recover`.
    /// - Throws: `MigrationError`: `undecided` when the operator's word is not enough, `busy` when the agent lives, `guest` when
    ///   there is nothing to recover.
    public func recover(
        _ id: String,
        claim: OwnershipClaim? = nil,
        because reason: String? = nil
    ) async throws -> MigrationReport {
        let reading = try source(id)
        let order = try SourceAgentOrder(reading: migrations.files(of: id).plan)
        let (loop, dataLoops) = (EventLoop(name: "control"), EventLoopGroup(name: "data"))
        defer {
            loop.stop()
            dataLoops.stop()
        }
        let outgoing = OutgoingMigration(
            plan: order.plan,
            credentials: try order.credentials(),
            loop: loop,
            dataLoops: dataLoops
        ) { [say] event in
            if let message = event.message { say(message) }
        }
        guard let claim else { return try await outgoing.recover(because: reason) }
        if let owner = Self.owner(reading, id) { throw MigrationError(.guest, owner) }
        say("asking \(reading.peer) at every address that it has, before guest '\(reading.guest)' is taken from it")
        let inquiry = try await outgoing.inquire()
        var author: String?
        switch inquiry.ruling(on: claim, of: order.plan, host: reading.peer) {
        case .refused(let error): throw error
        case .decided: break
        case .taken(let warning):
            say(warning)
            author = claim.author
        }
        try await endBackground(of: id, guest: reading.guest)
        // Whoever asked in the background may have had its answer meanwhile.
        let now = try source(id)
        guard now.standing == .source(.released) || OutgoingMigration.isUnfinished(id, now, migrations, guests) else {
            return Self.report(now, order.plan)
        }
        return try await outgoing.recover(takenBy: now.standing == .source(.released) ? author : nil)
    }

    /// Whose a guest is that nobody has to be asked about; nil when it was released and nothing more is known.
    private static func owner(_ reading: JournalReading, _ id: String) -> String? {
        guard case .source(let standing) = reading.standing else { return nil }
        let (guest, here) = ("Guest '\(reading.guest)'", "'crossdock recover \(id)' without --take-ownership")
        switch standing {
        case .released: return nil
        case .open: return "\(guest) was not released and belongs to this host; \(here) brings it back"
        case .reclaimed:
            return "\(guest) belongs to this host, \(reading.peer) will never run it; \(here) brings it back"
        case .taken(let by):
            return
                "\(guest) belongs to this host already, by the word of \(by); \(here) brings it back and tells \(reading.peer)"
        case .confirmed: return "\(guest) belongs to \(reading.peer), which has taken it over; there is nothing to take"
        case .overruled(let by): return "\(guest) belongs to \(reading.peer) by the word of \(by); it must not run here"
        case .rolledBack:
            return "\(guest) belongs to this host, the migration was rolled back; there is nothing to take"
        }
    }

    private func source(_ id: String) throws -> JournalReading {
        guard MigrationStore.isID(id) else { throw MigrationError(.guest, "'\(id)' is no migration's id") }
        guard let reading = try migrations.reading(of: id), case .source = reading.standing else {
            throw MigrationError(.guest, "There is no migration '\(id)' that started on this host")
        }
        return reading
    }

    /// A process that asks the destination in the background gives way to the operator.
    private func endBackground(of id: String, guest: String) async throws {
        let files = migrations.files(of: id)
        // The watchdog first: it would take the agent's place.
        for role in [MigrationFiles.Role.watchdog, .agent, .recovery] {
            guard let process = files.running(role) else { continue }
            process.signal(SIGKILL)
            await process.terminate(grace: .zero)
        }
        let end = ContinuousClock.now + .seconds(5)
        while try migrations.lock(guest: guest) == nil, ContinuousClock.now < end {
            try await Task.sleep(for: .milliseconds(20))
        }
    }

    /// What a migration has come to, as far as its journal says.
    static func report(_ reading: JournalReading, _ plan: MigrationPlan) -> MigrationReport {
        var report = MigrationReport(migration: plan.id, guest: plan.guest, destination: "\(plan.address)")
        report.isRecovered = true
        guard case .source(let standing) = reading.standing else { return report }
        switch standing {
        case .confirmed: report.outcome = .migrated
        case .overruled: report.outcome = .overruled
        case .released: report.outcome = .undecided
        case .open, .reclaimed, .taken, .rolledBack: report.outcome = .rolledBack
        }
        return report
    }
}
