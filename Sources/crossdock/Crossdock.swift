import ArgumentParser

/// The program.
@main
struct Crossdock: AsyncParsableCommand {
    /// The release.
    static let number = "0.1.0"

    static let configuration = CommandConfiguration(
        commandName: "crossdock",
        abstract: "Moves running virtual machines between hosts that share no storage, over TLS.",
        discussion: """
            To make two hosts a fleet:  crossdock pair [USER@]HOST
            On the host that receives:  crossdock destination
            On the host that sends:     crossdock migrate GUEST HOST
            To empty a host:            crossdock evacuate --to HOST
            To find out what is wrong:  crossdock doctor [HOST]

            Exit codes: 0 done; 10 the guest cannot be moved; 11 the destination cannot be reached; 12 TLS or \
            credentials failed; 13 the destination refused; 14 the migration did not converge; 15 it failed; 16 \
            undecided, or for an operator to decide; 17 the guest is being migrated already; 18 cancelled; 19 the guest was \
            moved but a disk's digests differ; 20 to 23 those of evacuate; 24 doctor found what keeps a guest from moving; 30 to 33 those of pair; 64 wrong usage; 1 anything else.
            """,
        version: "crossdock \(number)",
        subcommands: [
            DestinationCommand.self, MigrateCommand.self, EvacuateCommand.self, EvacuationAgentCommand.self,
            RestoreCommand.self,
            ExportCommand.self, SnapshotWatchdogCommand.self,
            ExportWatchdogCommand.self,
            StatusCommand.self, CancelCommand.self, DoctorCommand.self, CordonCommand.self, UncordonCommand.self,
            RecoverCommand.self, GuestCommand.self, ObjectCommand.self, PKICommand.self, PairCommand.self,
            PairMemberCommand.self, SecretCommand.self, ConsoleCommand.self, WebCommand.self, NBDCommand.self,
            SourceAgentCommand.self, SourceWatchdogCommand.self, HoldDevicesCommand.self,
        ]
    )

    /// Runs the program.
    static func main() async {
        let words = Array(CommandLine.arguments.dropFirst())
        if let sentence = CommandNames.fault(in: words, of: Self.self) ?? CommandNames.strayCommandLine(in: words) {
            printError("crossdock: \(sentence)")
            Self.exit(withError: ExitCode.validationFailure)
        }
        do { await main(try await ToolSpelling.parsed(words)) } catch {
            printError("crossdock: \(error)")
            Self.exit(withError: ExitCode(1))
        }
    }
}
