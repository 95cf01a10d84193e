import ArgumentParser
import Migration
import Source

/// Keeps others from the block devices of guests that have left.
struct HoldDevicesCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: DeviceHolder.command,
        abstract:
            "Holds the block devices that a guest has left; without a record, starts what holds those of all guests.",
        shouldDisplay: false
    )

    @OptionGroup var common: CommonOptions
    @Option var guest: String?
    @Option var record: String?
    @Option var device: [String] = []

    func run() async throws {
        guard record == nil else { DeviceHolder.stay() }
        try await failing {
            let problems = DeviceHolder.holdAgain(common.migrations)
            for problem in problems { printError("crossdock: \(problem)") }
            if !problems.isEmpty { throw ExitCode(MigrationError.Code.failed.rawValue) }
        }
    }
}
