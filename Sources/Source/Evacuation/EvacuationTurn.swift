internal import IO
internal import Migration

/// The right of a guest to be paused: no other guest of the evacuation is, on this host or on its target. It ends with its last
/// reference, and with the process.
final class EvacuationTurn {
    private let here: FileLock
    private let there: SwitchoverTurn?
    private let host: TargetHost

    init(here: FileLock, there: SwitchoverTurn?, host: TargetHost) {
        (self.here, self.there, self.host) = (here, there, host)
    }

    deinit {
        there?.end()
        host.close()
    }
}

extension OutgoingMigration {
    /// Waits for the turn, while the guest runs and the mirrors go on; a guest that is paused never waits for it.
    ///
    /// - Throws: as `MigrationContext.check`.
    func takeTurn() async throws {
        guard let evacuation = plan.evacuation, turn == nil else { return }
        context.enter("turn")
        let files = EvacuationFiles(stateDirectory: plan.stateDirectory)
        var here: FileLock?
        while here == nil {
            here = try files.takeTurn()
            if here == nil { try await context.wait(.milliseconds(50)) }
        }
        guard let here else { return }
        let host = TargetHost(
            host: plan.host,
            port: plan.port,
            evacuation: evacuation,
            credentials: context.credentials,
            on: context.loop
        )
        while true {
            try context.check()
            do {
                let there = try await host.turn(for: plan.guest, patience: .seconds(2))
                turn = EvacuationTurn(here: here, there: there, host: host)
                return
            } catch let error as MigrationError where error.code == .busy {
                continue
            } catch let error as MigrationError {
                // It makes pauses short; it is no reason not to move.
                context.warn("\(plan.host) gives no turn for the switchover: \(error)")
                turn = EvacuationTurn(here: here, there: nil, host: host)
                return
            }
        }
    }
}
