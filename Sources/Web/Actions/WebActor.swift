internal import Emulator
internal import IO
internal import Migration
internal import Source

/// Carries actions out, as the commands of the same names do. Blocks.
struct WebActor: Sendable {
    let host: WebHost

    /// Does it, or begins it.
    ///
    /// - Parameters:
    ///   - action: what.
    ///   - grant: who asks, with the right to act.
    /// - Returns: what is told, a sentence.
    /// - Throws: an error whose description says why it cannot be done; `HTTPFailure` with 403 for who may act on another guest only.
    func perform(_ action: WebAction, for grant: WebGrant) throws -> String {
        let directory = host.stateDirectory
        switch action {
        case .cancel(let id):
            guard MigrationStore.isID(id) else { throw MigrationError(.guest, "There is no such migration") }
            let follower = try MigrationFollower(finding: id, stateDirectory: directory)
            try allow(grant, follower.guest)
            follower.cancel()
            return "Migration \(id) of guest '\(follower.guest)' was asked to roll back"
        case .cancelEvacuation(let id):
            try allow(grant, nil)
            try EvacuationProcess.cancel(id, stateDirectory: directory)
            return "Evacuation \(id) ends after the switchovers that are under way"
        case .move(let guest, let name):
            try allow(grant, guest)
            return try move(guest, name)
        case .cordon(let message):
            try allow(grant, nil)
            guard message.utf8.count <= Cordon.longestMessage else {
                throw MigrationError(.guest, "A message has at most \(Cordon.longestMessage) bytes")
            }
            let cordon = Cordon(by: grant.name, message: message)
            try cordon.write(stateDirectory: directory)
            return "This host takes no new guests, it is \(cordon.sentence)"
        case .uncordon:
            try allow(grant, nil)
            let wasCordoned = try Cordon.remove(stateDirectory: directory)
            return wasCordoned ? "This host takes guests again" : "This host was not cordoned"
        }
    }

    /// A right for one guest is none for another, or for the host; and it does not tell whether there is another.
    private func allow(_ grant: WebGrant, _ guest: String?) throws {
        guard grant.guest == nil || grant.guest == guest else {
            throw HTTPFailure(
                status: 403,
                reason: "The ticket is for guest '\(grant.guest ?? "")' only"
            )
        }
    }

    private func move(_ guest: String, _ name: String) throws -> String {
        let guests = GuestStore(stateDirectory: host.stateDirectory)
        guard let move = host.move else { throw MigrationError(.failed, "This agent moves no guests") }
        guard let record = try guests.load(guest) else { throw guests.unknown(guest) }
        if let bar = try MigrationStore(stateDirectory: host.stateDirectory).startBar(of: guest) {
            throw MigrationError(.guest, bar.sentence(guest: guest))
        }
        guard record.process?.isRunning == true else {
            throw MigrationError(.guest, "Guest '\(guest)' does not run here")
        }
        let target = try EvacuationOrder.Target(parsing: name)
        return "Guest '\(guest)' begins to move to \(target): migration \(try move(guest, target))"
    }
}
