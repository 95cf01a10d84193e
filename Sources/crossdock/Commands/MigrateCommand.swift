import ArgumentParser
import Glibc
import IO
import Migration
import Source
import Synchronization

struct MigrateCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "migrate",
        abstract: "Moves a running guest to another host, with its disks.",
        discussion: """
            A source agent does the work on its own: closing the terminal does not end the migration. Ctrl-C asks for a \
            roll-back, after which the guest runs here as if nothing had happened; once the guest was released to the \
            other host there is no way back. Every migration begins with a rehearsal, in which a blank copy of the guest moves; \
            with --dry-run it ends there.
            """
    )

    @Argument(help: "The guest's name; see 'crossdock guest list'.")
    var guest: String

    @Argument(
        help: ArgumentHelp(
            "The host that receives it; its certificate must be for this name.",
            valueName: "host[:port]"
        )
    )
    var destination: String

    @OptionGroup var common: CommonOptions
    @OptionGroup var security: CredentialOptions

    @Option(
        help: ArgumentHelp(
            "The QMP monitor of a QEMU that something else started; it is adopted under the guest's name.",
            valueName: "socket"
        )
    )
    var qmp: String?

    @Option(help: ArgumentHelp("The format of the images there: raw or qcow2; by default that of each image here."))
    var format: String?

    @Flag(help: "Only find out whether the migration will work, why not, and how long it will take.")
    var dryRun = false

    @Option(help: "Connections for each disk.")
    var connections: Int = 4

    @Option(help: ArgumentHelp("The most that disks, and then memory, may use; 0 for no limit.", valueName: "size/s"))
    var bandwidth = ByteCount(0)

    @Option(help: ArgumentHelp("The pause of the guest to aim at.", valueName: "ms"))
    var downtimeLimit: Int = 300

    @Option(help: ArgumentHelp("A pause that is given up: the guest resumes here.", valueName: "ms"))
    var blackoutDeadline: Int = 10_000

    @Option(
        help: ArgumentHelp(
            "How long an outage of the link or of the other host is waited for, while the guest runs here: 90s, 10m.",
            valueName: "time"
        )
    )
    var patience = TimeSpan.minutes(5)

    @Option(
        help: ArgumentHelp(
            "The most that the copy of a disk keeps in memory: what is under way, and what is not yet durable there.",
            valueName: "bytes"
        )
    )
    var mirrorMemory: Int = 64 << 20

    @Option(
        help: ArgumentHelp(
            """
            What is compared before the guest moves: what was sent with what the other host reads back (sent), or both \
            images from their first byte to their last, with the guest paused meanwhile (full).
            """,
            valueName: "sent|full"
        )
    )
    var verify: String = "sent"

    @Option(help: ArgumentHelp("How long this host keeps the old images: 90s, 12h, 7d.", valueName: "time"))
    var keepSource = TimeSpan.days(7)

    @Option(help: ArgumentHelp("Where to write the report.", valueName: "file"))
    var report: String?

    @Flag(help: "Print one JSON event a line.")
    var json = false

    func validate() throws {
        if let format, !["raw", "qcow2"].contains(format) {
            throw ValidationError("--format takes raw or qcow2, not '\(format)'")
        }
        guard (1...64).contains(connections) else { throw ValidationError("--connections takes 1 to 64") }
        guard (1...2_000_000).contains(downtimeLimit) else {
            throw ValidationError("--downtime-limit takes 1 to 2000000")
        }
        guard bandwidth.value <= 1 << 50 else { throw ValidationError("--bandwidth takes at most 1125899906842624") }
        guard (100...3_600_000).contains(blackoutDeadline), blackoutDeadline >= downtimeLimit else {
            throw ValidationError("--blackout-deadline takes 100 to 3600000, and not less than --downtime-limit")
        }
        try patience.checkPatience()
        guard ["sent", "full"].contains(verify) else { throw ValidationError("--verify takes sent or full") }
        guard (16 << 20...16 << 30).contains(mirrorMemory) else {
            throw ValidationError("--mirror-memory takes 16777216 to 17179869184")
        }
    }

    func run() async throws {
        let agent = Guarded<SourceAgent?>(nil)
        let interrupts = Atomic<Int>(0)
        SignalWatcher.start([SIGINT, SIGTERM]) { number in
            if interrupts.wrappingAdd(1, ordering: .relaxed).oldValue > 0 { Glibc.exit(128 + number) }
            printError("\ncrossdock: rolling back; once more to leave the agent alone with it")
            agent.withLock { $0?.cancel() }
        }
        try await failing {
            let plan = try makePlan()
            FencedImages.purge(common.migrations)
            let started = try SourceAgent.start(
                SourceAgentOrder(plan: plan, credentials: security.selection, directory: currentDirectory)
            )
            agent.withLock { $0 = started }
            guard let finished = try await show(started, plan) else { return }
            if let path = report {
                try DurableFile.write(Array(finished.json.utf8), to: DurableFile.resolve(path, in: currentDirectory))
            }
            if finished.code != 0 { throw ExitCode(finished.code) }
        }
    }

    private func makePlan() throws -> MigrationPlan {
        let address = try SocketAddress(parsing: destination, defaultPort: MessageConnection.port)
        guard case .inet(let host, let port) = address, !host.isEmpty else {
            throw MigrationError(.unreachable, "'\(destination)' is no host; write HOST or HOST:PORT")
        }
        var plan = MigrationPlan(
            id: MigrationStore.makeID(),
            guest: guest,
            host: host,
            port: port,
            stateDirectory: common.stateDirectory
        )
        plan.connections = connections
        plan.monitor = qmp.map { DurableFile.resolve($0, in: currentDirectory) }
        plan.format = format
        plan.isRehearsal = dryRun
        plan.bandwidth = bandwidth.value
        plan.downtimeLimit = downtimeLimit
        plan.blackoutDeadline = blackoutDeadline
        plan.keepSource = keepSource.seconds
        plan.patience = patience.seconds
        plan.mirrorMemory = mirrorMemory
        plan.verifiesFully = verify == "full"
        return plan
    }

    /// Shows what an agent does until it has ended.
    private func show(_ agent: SourceAgent, _ plan: MigrationPlan) async throws -> MigrationReport? {
        var renderer: any EventRenderer =
            json
            ? JSONRenderer() : ProgressRenderer(destination: plan.host, stateDirectory: plan.stateDirectory)
        defer { renderer.finish() }
        var report: MigrationReport?
        for try await event in agent.events {
            renderer.render(event)
            report = event.report ?? report
        }
        return report
    }
}
