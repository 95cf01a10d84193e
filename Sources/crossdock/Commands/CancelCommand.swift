import ArgumentParser
import Migration
import Source

struct CancelCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "cancel",
        abstract: "Rolls a migration back that is under way from this host, as Ctrl-C in its terminal does.",
        discussion: """
            Waits until it has ended. Exit codes: 0 it was rolled back, and the guest is here; 1 it was too late, the guest has moved; \
            10 there is no such migration under way; 16 undecided.
            """
    )

    @Argument(help: "The guest, or the migration's id as 'crossdock status' shows it.")
    var name: String

    @OptionGroup var common: CommonOptions

    func run() async throws {
        try await failing {
            try common.checkAccess()
            let follower = try MigrationFollower(finding: name, stateDirectory: common.stateDirectory)
            follower.cancel()
            var report: MigrationReport?
            for try await event in follower.events() { report = event.report ?? report }
            guard let report else {
                throw MigrationError(
                    .undecided,
                    "The source agent of migration \(follower.migration) ended without a report; see 'crossdock status'"
                )
            }
            switch report.outcome {
            case .rolledBack, .rehearsed:
                output(
                    "Migration \(follower.migration) of guest '\(report.guest)' was rolled back; the guest is on this host.\n"
                )
            case .migrated, .overruled:
                printError("crossdock: It was too late to cancel: guest '\(report.guest)' is on \(report.destination)")
                throw ExitCode(1)
            case .undecided:
                printError("crossdock: \(report.reason ?? "Who owns guest '\(report.guest)' is not known")")
                throw ExitCode(MigrationError.Code.undecided.rawValue)
            }
        }
    }
}
