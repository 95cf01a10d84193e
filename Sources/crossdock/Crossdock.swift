import ArgumentParser

/// The program.
@main
struct Crossdock: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "crossdock",
        abstract: "Moves running virtual machines between hosts that share no storage, over TLS.",
        discussion: """
            On the host that receives:  crossdock destination
            On the host that sends:     crossdock migrate GUEST HOST

            Exit codes: 0 done; 10 the guest cannot be moved; 11 the destination cannot be reached; 12 TLS or \
            credentials failed; 13 the destination refused; 14 the migration did not converge; 15 it failed; 16 \
            undecided, or for an operator to decide; 17 the guest is being migrated already; 18 cancelled; 19 the guest was \
            moved but a disk's digests differ; 64 wrong usage; 1 anything else.
            """,
        version: "crossdock 0.1.0",
        subcommands: [
            DestinationCommand.self, MigrateCommand.self, ExportCommand.self, SnapshotWatchdogCommand.self,
            ExportWatchdogCommand.self,
            StatusCommand.self, RecoverCommand.self, GuestCommand.self,
            ObjectCommand.self, PKICommand.self, SecretCommand.self, NBDCommand.self,
            SourceAgentCommand.self, SourceWatchdogCommand.self, HoldDevicesCommand.self,
        ]
    )
}
