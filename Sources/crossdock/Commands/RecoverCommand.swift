import ArgumentParser
import Emulator
import IO
import Migration
import Source
import TLS

struct RecoverCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "recover",
        abstract: "Ends migrations whose source agent has died.",
        discussion: """
            What is done follows from the journal alone. Before the release the guest belongs to this host: it is cleaned \
            up and resumed here. After it the guest belongs to the destination, which is asked until it confirms.
            """
    )

    @Argument(help: "The migration; every one that needs it when none is given.")
    var migration: String?

    @OptionGroup var common: CommonOptions

    func run() async throws {
        try await failing {
            let ids = try migration.map { [$0] } ?? common.migrations.ids().filter { try needsRecovery($0) }
            if ids.isEmpty { output("There is nothing to recover on this host.\n") }
            for id in ids { try await recover(id) }
        }
    }

    private func needsRecovery(_ id: String) throws -> Bool {
        let records = try Journal.read(common.migrations.journal(of: id))
        guard case .offered(let guest, _, _) = records.first, !records.isRolledBack, !records.contains(.confirmed)
        else {
            return false
        }
        // A migration whose agent holds the guest's lock is at work.
        return try common.migrations.lock(guest: guest) != nil
    }

    private func recover(_ id: String) async throws {
        guard MigrationStore.isID(id),
            let bytes = try DurableFile.read("\(common.migrations.directory(of: id))/plan.json"),
            let order = JSONText.decode(SourceAgentOrder.self, from: bytes)
        else { throw MigrationError(.guest, "There is no migration '\(id)' that started on this host") }
        let outgoing = OutgoingMigration(
            plan: order.plan,
            credentials: try order.credentials(),
            loop: EventLoop(name: "control"),
            dataLoops: EventLoopGroup(name: "data")
        ) { event in
            if let message = event.message { printError("crossdock: \(message)") }
        }
        let report = try await outgoing.recover()
        switch report.outcome {
        case .migrated: output("Guest '\(order.plan.guest)' belongs to \(order.plan.host) and runs there.\n")
        case .rolledBack: output("Guest '\(order.plan.guest)' belongs to this host; migration \(id) was rolled back.\n")
        case .rehearsed: break
        case .undecided: output("Who owns guest '\(order.plan.guest)' is not known.\n")
        }
        if report.code != 0 { throw ExitCode(report.code) }
    }
}
