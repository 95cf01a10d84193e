import ArgumentParser
import Glibc
import IO
import Migration
import Source
import Synchronization

struct MigrateCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "migrate",
        abstract: "Moves a guest to another host, with its disks: one that runs, is paused, or is off.",
        discussion: """
            A source agent does the work on its own: closing the terminal does not end the migration. Ctrl-C asks for a \
            roll-back, after which the guest runs here as if nothing had happened; once the guest was released to the \
            other host there is no way back. Every migration begins with a rehearsal, in which a blank copy of the guest moves; \
            with --dry-run it ends there.
            """
    )

    private static let usualMemory = ByteCount(UInt64(MigrationPlan.usualMirrorMemory))

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

    @Option(
        help: ArgumentHelp(
            "An image of the other host, by its path below a directory that its operator lists for this one (--allow-seed): the disk "
                + "begins with a copy of it, and only what differs is sent. Of a guest with several disks: DISK=NAME, and once for each.",
            valueName: "[disk=]name"
        )
    )
    var seed: [String] = []

    @OptionGroup var networks: NetworkOptions

    @Flag(help: "Only find out whether the migration will work, why not, and how long it will take.")
    var dryRun = false

    @Option(
        help: ArgumentHelp(
            "The most that disks, and then memory, may use, counted before it is compressed; 0 for no limit.",
            valueName: "size/s"
        ),
        transform: ByteCount.parse
    )
    var bandwidth = ByteCount(0)

    @OptionGroup var limits: MoveOptions

    @Option(
        help: ArgumentHelp(
            "The most that the copy of a disk keeps in memory, 16M to 16G: what is under way, and what is not yet durable there.",
            default: MigrateCommand.usualMemory,
            valueName: "size"
        ),
        transform: ByteCount.parse
    )
    var mirrorMemory = MigrateCommand.usualMemory

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

    @Option(help: ArgumentHelp("Where to write the report.", valueName: "file"))
    var report: String?

    @Flag(help: "Print one JSON event a line.")
    var json = false

    func validate() throws {
        if let format, !["raw", "qcow2"].contains(format) {
            throw ValidationError("--format takes raw or qcow2, not '\(format)'")
        }
        try limits.check()
        try MoveOptions.check(bandwidth: bandwidth)
        _ = try seeds()
        _ = try networks.bridges()
        guard ["sent", "full"].contains(verify) else { throw ValidationError("--verify takes sent or full") }
        guard (16 << 20...16 << 30).contains(mirrorMemory.value) else {
            throw ValidationError("--mirror-memory takes 16M to 16G")
        }
        _ = try EvacuationOrder.Target(argument: destination)
    }

    /// The images that --seed names, by the disk.
    private func seeds() throws -> [String: String]? {
        var seeds: [String: String] = [:]
        for text in seed {
            let parts = text.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false).map(String.init)
            let isNamed = parts.count == 2 && MigrationStore.isID(parts[0])
            let (disk, name) = isNamed ? (parts[0], parts[1]) : ("", text)
            guard !name.isEmpty, !name.hasPrefix("/"), seeds.updateValue(name, forKey: disk) == nil else {
                throw ValidationError(
                    "--seed takes [DISK=]NAME, a path below a directory of the other host, once for each disk"
                )
            }
        }
        return seeds.isEmpty ? nil : seeds
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
            try common.checkAccess(forWriting: true)
            let report = try report.map { try ReportFile($0) }
            let plan = try makePlan()
            FencedImages.purge(common.migrations)
            let started = try SourceAgent.start(
                SourceAgentOrder(plan: plan, credentials: security.selection, directory: currentDirectory)
            )
            agent.withLock { $0 = started }
            guard let finished = try await show(started, plan) else { return }
            try report?.write(finished)
            if finished.code != 0 { throw ExitCode(finished.code) }
        }
    }

    private func makePlan() throws -> MigrationPlan {
        let target = try EvacuationOrder.Target(argument: destination)
        var plan = MigrationPlan(
            id: MigrationStore.makeID(),
            guest: guest,
            host: target.host,
            port: target.port,
            stateDirectory: common.stateDirectory
        )
        limits.fill(&plan)
        plan.monitor = qmp.map { DurableFile.resolve($0, in: currentDirectory) }
        plan.format = format
        plan.isRehearsal = dryRun
        plan.bandwidth = bandwidth.value
        plan.mirrorMemory = Int(mirrorMemory.value)
        plan.verifiesFully = verify == "full"
        plan.seeds = try seeds()
        plan.networks = try networks.bridges().map { NetworkMap($0) }
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
