import ArgumentParser
import CLinux
import Emulator
import Glibc
import IO
import Migration
import Source
import Synchronization
import TLS

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

    @Option(help: ArgumentHelp("The most that disks, and then memory, may use; 0 for no limit.", valueName: "bytes/s"))
    var bandwidth: UInt64 = 0

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
    var patience: String = "5m"

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
    var keepSource: String = "7d"

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
        guard bandwidth <= 1 << 50 else { throw ValidationError("--bandwidth takes at most 1125899906842624") }
        guard (100...3_600_000).contains(blackoutDeadline), blackoutDeadline >= downtimeLimit else {
            throw ValidationError("--blackout-deadline takes 100 to 3600000, and not less than --downtime-limit")
        }
        _ = try Patience.seconds(patience)
        guard ["sent", "full"].contains(verify) else { throw ValidationError("--verify takes sent or full") }
        guard (16 << 20...16 << 30).contains(mirrorMemory) else {
            throw ValidationError("--mirror-memory takes 16777216 to 17179869184")
        }
        guard Self.seconds(keepSource) != nil else {
            throw ValidationError("--keep-source takes a number with s, m, h or d: 7d")
        }
    }

    static func seconds(_ text: String) -> Int? {
        guard let unit = text.last, let count = Int(text.dropLast()), count >= 0 else { return nil }
        let factors: [Character: Int] = ["s": 1, "m": 60, "h": 3600, "d": 86400]
        guard let factor = factors[unit], count <= 100_000_000 else { return nil }
        return count * factor
    }

    func run() async throws {
        let agent = Guarded<EmulatorProcess?>(nil)
        let interrupts = Atomic<Int>(0)
        SignalWatcher.start([SIGINT, SIGTERM]) { number in
            if interrupts.wrappingAdd(1, ordering: .relaxed).oldValue > 0 { Glibc.exit(128 + number) }
            printError("\ncrossdock: rolling back; once more to leave the agent alone with it")
            agent.withLock { $0?.signal(SIGINT) }
        }
        try await failing {
            let address = try SocketAddress(parsing: destination, defaultPort: MessageConnection.port)
            guard case .inet(let host, let port) = address, !host.isEmpty else {
                throw MigrationError(.unreachable, "'\(destination)' is no host; write HOST or HOST:PORT")
            }
            FencedImages.purge(common.migrations)
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
            plan.bandwidth = bandwidth
            plan.downtimeLimit = downtimeLimit
            plan.blackoutDeadline = blackoutDeadline
            plan.keepSource = Self.seconds(keepSource) ?? 0
            plan.patience = try Patience.seconds(patience)
            plan.mirrorMemory = mirrorMemory
            plan.verifiesFully = verify == "full"
            let (process, events) = try startAgent(plan)
            agent.withLock { $0 = process }
            let finished = try await follow(plan, events)
            if let path = report {
                try DurableFile.write(Array(finished.json.utf8), to: DurableFile.resolve(path, in: currentDirectory))
            }
            if finished.code != 0 { throw ExitCode(finished.code) }
        }
    }

    /// Starts the source agent in a session of its own. Its events come through a pipe that it does not depend on.
    private func startAgent(_ plan: MigrationPlan) throws -> (EmulatorProcess, Int32) {
        let files = common.migrations.files(of: plan.id)
        try DurableFile.makeDirectory(files.directory)
        let order = SourceAgentOrder(
            plan: plan,
            objects: security.objects,
            tlsCreds: security.tlsCreds,
            directory: currentDirectory
        )
        try DurableFile.write(try JSONText.encode(order), to: files.plan)
        var ends: [Int32] = [-1, -1]
        guard pipe(&ends) == 0 else { throw ChannelError.system("make a pipe", errno) }
        _ = fcntl(ends[0], F_SETFD, FD_CLOEXEC)
        defer { close(ends[1]) }
        let program = DurableFile.resolve("/proc/self/exe", in: "/")
        let process = try EmulatorProcess.start(
            [program, "source-agent", "--plan", files.plan, "--events", "\(ends[1])"],
            directory: currentDirectory,
            log: files.log(.agent),
            keep: [ends[1]]
        )
        return (process, ends[0])
    }

    private func follow(_ plan: MigrationPlan, _ events: Int32) async throws -> MigrationReport {
        var renderer: any EventRenderer = json ? JSONRenderer() : ProgressRenderer(destination: plan.host)
        let loop = EventLoop(name: "events")
        defer { loop.stop() }
        let lines = AsyncStream<[UInt8]>.makeStream()
        let reader = Task.detached {
            try await BlockingPool.shared.run {
                var rest: [UInt8] = []
                var piece = [UInt8](repeating: 0, count: 65536)
                while true {
                    let count = read(events, &piece, piece.count)
                    if count < 0, errno == EINTR { continue }
                    if count <= 0 { break }
                    rest.append(contentsOf: piece[..<count])
                    while let end = rest.firstIndex(of: UInt8(ascii: "\n")) {
                        lines.continuation.yield(Array(rest[..<end]))
                        rest.removeSubrange(...end)
                    }
                }
                lines.continuation.finish()
            }
        }
        var report: MigrationReport?
        for await line in lines.stream {
            guard let event = MigrationEvent(parsing: line) else { continue }
            renderer.render(event)
            if let finished = event.report { report = finished }
        }
        _ = try await reader.value
        renderer.finish()
        if report == nil {
            try await waitForRecovery(of: plan.id)
            report = try DurableFile.read(common.migrations.files(of: plan.id).report).flatMap {
                try? MigrationReport(parsing: $0)
            }
            // A recovery that did what it should is a success, the migration is none.
            if report?.code == 0, report?.outcome != .migrated { report?.code = MigrationError.Code.failed.rawValue }
            if let report {
                var event = MigrationEvent("finished", migration: plan.id, guest: guest, ms: report.totalMS)
                event.report = report
                renderer.render(event)
            }
        }
        guard let report else {
            // Nothing was begun that would have to be decided.
            let words = EmulatorProcess.tail(of: common.migrations.files(of: plan.id).log(.agent))
            throw MigrationError(
                .undecided,
                "The source agent ended without a report: \(words.isEmpty ? "it said nothing" : words). See 'crossdock status'"
            )
        }
        return report
    }
}

extension MigrateCommand {
    /// The agent ended without a word: its watchdog takes the migration up, which may take as long as the other host is away.
    private func waitForRecovery(of id: String) async throws {
        let end = ContinuousClock.now + .seconds(15)
        var hasBegun = false
        let files = common.migrations.files(of: id)
        while !DurableFile.exists(files.report) {
            let isRunning = Recovery.process(of: id, common.migrations) != nil
            if isRunning, !hasBegun {
                hasBegun = true
                printError("crossdock: the source agent has ended; its watchdog recovers the migration")
            }
            if hasBegun ? !isRunning : ContinuousClock.now > end || !DurableFile.exists(files.log(.watchdog)) { return }
            try await Task.sleep(for: .milliseconds(50))
        }
    }
}

/// How long an outage is waited for.
enum Patience {
    /// The seconds of an option like `10m`; a number alone is in seconds.
    static func seconds(_ text: String) throws -> Int {
        guard let seconds = Int(text) ?? MigrateCommand.seconds(text), (1...604_800).contains(seconds) else {
            throw ValidationError("--patience takes a time from 1s to 7d: 90s, 10m")
        }
        return seconds
    }
}

/// What the command tells the source agent that it starts.
struct SourceAgentOrder: Codable {
    var plan: MigrationPlan
    var objects: [String]
    var tlsCreds: String?
    /// What relative paths among them begin from.
    var directory: String

    /// The credentials that the command named.
    func credentials() throws -> any TLSCredentials {
        guard chdir(directory) == 0 else { throw ChannelError.system("enter the directory \(directory)", errno) }
        var security = CredentialOptions()
        security.objects = objects
        security.tlsCreds = tlsCreds
        for object in try objects.map(ObjectDescription.init(parsing:)) where object.properties["fd"] != nil {
            throw CredentialError(
                "Secret '\(object.id)' is read from a descriptor, which the source agent, a process of its own, does not inherit; "
                    + "use file="
            )
        }
        let credentials = try security.credentials(.client, from: security.store(), user: "the source agent") { _ in }
        guard credentials.verifiesPeer else {
            throw CredentialError(
                "The credentials '\(credentials.id)' do not verify the destination: a guest is not sent to just anybody"
            )
        }
        return credentials
    }
}

/// The source agent itself: one process for one migration.
struct SourceAgentCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "source-agent",
        abstract: "Carries out one migration; started by 'crossdock migrate'.",
        shouldDisplay: false
    )

    @Option var plan: String
    @Option var events: Int32 = -1

    func run() async throws {
        let migration = Guarded<OutgoingMigration?>(nil)
        let wasCancelled = Atomic<Bool>(false)
        SignalWatcher.start([SIGINT, SIGTERM, SIGHUP]) { number in
            if number == SIGHUP { return }
            wasCancelled.store(true, ordering: .relaxed)
            migration.withLock { $0?.cancel() }
        }
        guard let bytes = try DurableFile.read(plan),
            let order = JSONText.decode(SourceAgentOrder.self, from: bytes)
        else { throw ValidationError("\(plan) is no plan") }
        let store = MigrationStore(stateDirectory: order.plan.stateDirectory)
        let files = store.files(of: order.plan.id)
        if let process = EmulatorProcess(pid: getpid()) {
            try? DurableFile.write(try JSONText.encode(process), to: files.process(.agent))
        }
        let file = open(files.events, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o600)
        let pipe = events
        // Whoever watches may be suspended: the migration must not wait for it. What does not fit is in the files.
        if pipe >= 0 { _ = fcntl(pipe, F_SETFL, O_NONBLOCK) }
        let emit: @Sendable (MigrationEvent) -> Void = { event in
            let line = Array(event.line.utf8)
            line.withUnsafeBytes { bytes in
                // Progress is for who watches now; the file keeps what happened.
                if event.event != "progress" { _ = write(file, bytes.baseAddress, bytes.count) }
                if pipe >= 0 { _ = write(pipe, bytes.baseAddress, bytes.count) }
            }
        }
        var report = MigrationReport(
            migration: order.plan.id,
            guest: order.plan.guest,
            destination: "\(order.plan.address)"
        )
        do {
            let outgoing = OutgoingMigration(
                plan: order.plan,
                credentials: try order.credentials(),
                loop: EventLoop(name: "control"),
                dataLoops: EventLoopGroup(name: "data"),
                emit: emit
            )
            migration.withLock { $0 = outgoing }
            if wasCancelled.load(ordering: .relaxed) { outgoing.cancel() }
            report = try await outgoing.start()
        } catch {
            report.reason = "\(error)"
            report.code = (error is CredentialError ? MigrationError.Code.security : .failed).rawValue
            var event = MigrationEvent("finished", migration: order.plan.id, guest: order.plan.guest, ms: 0)
            event.report = report
            emit(event)
        }
        unlink(files.process(.agent))
        if !DurableFile.exists(store.journal(of: order.plan.id)) { DurableFile.remove(files.directory) }
        if report.code != 0 { throw ExitCode(report.code) }
    }
}
