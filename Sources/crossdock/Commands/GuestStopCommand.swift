import ArgumentParser
import Migration
import Source

extension GuestCommand {
    struct Stop: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Asks a guest to shut down, and waits until it has.",
            discussion: """
                The guest is asked as by the button of its machine (ACPI); when it does not shut down in time it goes on, and the command \
                fails. With --force its QEMU ends at once, as if the power were cut.
                """
        )
        @OptionGroup var common: CommonOptions
        @Argument(help: "The guest's name.")
        var name: String
        @Flag(help: "End QEMU without asking the guest.")
        var force = false
        @Option(
            help: ArgumentHelp("How long the guest may take to shut down: 90s, 5m.", valueName: "time"),
            transform: TimeSpan.parse
        )
        var patience = TimeSpan.minutes(2)

        func run() async throws {
            try await failing {
                let life = GuestLife(stateDirectory: common.stateDirectory)
                let wasRunning = try await life.stop(name, force ? .force : .asking(.seconds(patience.seconds)))
                let guest = GuestWhereabouts(of: name, stateDirectory: common.stateDirectory)
                output(guest.sentence(guest: name, afterStop: wasRunning) + ".\n")
            }
        }
    }

    struct Remove: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Forgets a guest of this host that does not run. Its images stay where they are.",
            discussion: "For a guest that belongs to another host there is 'crossdock guest forget'."
        )
        @OptionGroup var common: CommonOptions
        @Argument(help: "The guest's name.")
        var name: String

        func run() async throws {
            try await failing {
                let images = try GuestLife(stateDirectory: common.stateDirectory).remove(name)
                output("Guest '\(name)' is not known on this host any more.\n")
                for path in images { output("its image \(path) stays\n") }
            }
        }
    }

    struct Autostart: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Starts the guests that are set to be started with this host; for crossdock-guests.service.",
            discussion: """
                'crossdock guest set NAME --autostart on' sets a guest so. A guest that belongs to another host, or is on its way here, is \
                never started, whatever its record says. Exit codes: 0 all that should run here do; 10 some could not be started.
                """
        )
        @OptionGroup var common: CommonOptions
        @Flag(help: "Only say what would be started.")
        var dryRun = false

        func run() async throws {
            try await failing {
                try common.checkAccess(forWriting: true)
                var hasFailed = false
                for result in await GuestLife(stateDirectory: common.stateDirectory).autostart(onlyLooks: dryRun) {
                    switch result {
                    case .started(let guest): output("Guest '\(guest)' \(dryRun ? "would be started" : "runs").\n")
                    case .skipped(_, let reason): output("\(reason).\n")
                    case .failed(let guest, let reason):
                        printError("crossdock: Guest '\(guest)' was not started: \(reason)")
                        hasFailed = true
                    }
                }
                if hasFailed { throw ExitCode(MigrationError.Code.guest.rawValue) }
            }
        }
    }
}
