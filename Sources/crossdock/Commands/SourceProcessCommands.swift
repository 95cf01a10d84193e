import ArgumentParser
import Source

/// The source agent itself: one process for one migration.
struct SourceAgentCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: SourceProcess.Command.agent.rawValue,
        abstract: "Carries out one migration; started by 'crossdock migrate'.",
        shouldDisplay: false
    )

    @Argument(parsing: .captureForPassthrough) var arguments: [String] = []

    func run() async throws { try await SourceProcess.run(.agent, arguments) }
}

/// Looks after a guest whose source agent dies; started by it.
struct SourceWatchdogCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: SourceProcess.Command.watchdog.rawValue,
        abstract: "Resumes a guest whose source agent dies or stands still, and recovers its migration.",
        shouldDisplay: false
    )

    @Argument(parsing: .captureForPassthrough) var arguments: [String] = []

    func run() async throws { try await SourceProcess.run(.watchdog, arguments) }
}

extension SourceProcess {
    fileprivate static func run(_ command: Command, _ arguments: [String]) async throws {
        guard let process = SourceProcess(command, parsing: arguments) else {
            throw ValidationError("'crossdock \(command.rawValue)' is for Crossdock itself")
        }
        let code = try await failing { try await process.run { printError("crossdock: \($0)") } }
        if code != 0 { throw ExitCode(code) }
    }
}
