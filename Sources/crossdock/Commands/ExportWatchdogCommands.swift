import ArgumentParser
import Emulator
import IO

/// Lets a guest go on when its export cannot; started by `crossdock export`.
struct SnapshotWatchdogCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "snapshot-watchdog",
        abstract: "Lets a guest go on that was stopped for a snapshot.",
        shouldDisplay: false
    )

    @Option var parent: Int32
    @Option var agent: String?
    @Option var monitor: String?
    @Option var seconds: Int

    func run() async throws {
        let loop = EventLoop(name: "watchdog")
        await SnapshotWatchdog.watch(parent: parent, agent: agent, monitor: monitor, seconds: seconds, on: loop)
    }
}

/// Ends an export that stands still; started by `crossdock export`.
struct ExportWatchdogCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "export-watchdog",
        abstract: "Ends an export that stands still, before its guests do.",
        shouldDisplay: false
    )

    @Option var parent: Int32
    @Option var pipe: Int32

    func run() { Heartbeat.watch(parent: parent, pipe: pipe) }
}
