import ArgumentParser
import Emulator
import Glibc
import IO
import Migration
import Source
import TLS

struct RecoverCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "recover",
        abstract: "Ends migrations whose agent has died, and says who owns the guest.",
        discussion: """
            What is done follows from the journal alone. Before the release the guest belongs to the host that it comes from: it \
            is cleaned up and resumed there. After it the destination is asked until it answers: it has the guest, or it will \
            never run it and the guest comes back.

            Only when the other host is gone for good, and nobody can be asked, --take-ownership makes the guest this host's. \
            The other host must never start its copy afterwards. It is written into the journal, with who decided.
            """
    )

    @Argument(help: "The migration; every one that needs it when none is given.")
    var migration: String?

    @Flag(
        help: """
            The other host is gone for good and its copy will never run: the guest belongs to this host. Needs the migration's \
            id.
            """
    )
    var takeOwnership = false

    @Flag(help: "You know that the other host is switched off; for --take-ownership.")
    var otherHostIsOff = false

    @Option(
        help: ArgumentHelp(
            "You know that the other host, which has this name in 'crossdock status', was installed anew; for --take-ownership.",
            valueName: "name"
        )
    )
    var otherHostWasErased: String?

    @OptionGroup var common: CommonOptions

    func validate() throws {
        if takeOwnership, migration == nil { throw ValidationError("--take-ownership needs the migration's id") }
    }

    func run() async throws {
        try await failing {
            let ids = try migration.map { [$0] } ?? common.migrations.ids().filter { try needsRecovery($0) }
            if ids.isEmpty { output("There is nothing to recover on this host.\n") }
            if let migration {
                let code = try await recover(migration)
                if code != 0 { throw ExitCode(code) }
                return
            }
            // One destination may be away for long, and the other guests are none of its business.
            let code = await withTaskGroup(of: Int32.self) { group in
                for id in ids {
                    group.addTask {
                        do { return try await self.recover(id) } catch {
                            printError("crossdock: migration \(id): \(error)")
                            return (error as? MigrationError)?.code.rawValue ?? MigrationError.Code.failed.rawValue
                        }
                    }
                }
                return await group.reduce(0) { $0 == 0 ? $1 : $0 }
            }
            if code != 0 { throw ExitCode(code) }
        }
    }

    private func needsRecovery(_ id: String) throws -> Bool {
        let reading: JournalReading?
        do { reading = try common.migrations.reading(of: id) } catch {
            printError("crossdock: \(error)")
            return false
        }
        switch reading?.standing {
        case .source:
            let guests = GuestStore(stateDirectory: common.stateDirectory)
            guard let reading, OutgoingMigration.isUnfinished(id, reading, common.migrations, guests) else {
                return false
            }
            // A migration whose agent holds the guest's lock is at work.
            return try common.migrations.lock(guest: reading.guest) != nil
        case .destination(.prepared): return true
        case .destination, nil: return false
        }
    }

    private func recover(_ id: String) async throws -> Int32 {
        guard MigrationStore.isID(id) else { throw MigrationError(.guest, "'\(id)' is no migration's id") }
        guard let reading = try common.migrations.reading(of: id) else {
            throw MigrationError(.guest, "There is no migration '\(id)' on this host")
        }
        if case .destination(let standing) = reading.standing {
            return try await recoverIncoming(id, reading.guest, reading.peer, standing)
        }
        if takeOwnership { try await endRecovery(of: id) }
        return try await Recovery.run(id, common.migrations, takenBy: takeOwnership ? operatorName : nil)
    }

    /// Who sits in front of this terminal, for the journal.
    private var operatorName: String {
        let name = getpwuid(getuid()).flatMap { $0.pointee.pw_name }.map { String(cString: $0) } ?? "user \(getuid())"
        return "\(name), with 'crossdock recover --take-ownership'"
    }

    /// A process that asks the destination in the background gives way to the operator.
    private func endRecovery(of id: String) async throws {
        guard let reading = try common.migrations.reading(of: id), reading.standing == .source(.released) else {
            return
        }
        // The watchdog first: it would take the agent's place.
        for role in [MigrationFiles.Role.watchdog, .agent, .recovery] {
            guard let process = Recovery.process(of: id, common.migrations, role) else { continue }
            process.signal(SIGKILL)
            await process.terminate(grace: .zero)
        }
        let end = ContinuousClock.now + .seconds(5)
        while try common.migrations.lock(guest: reading.guest) == nil, ContinuousClock.now < end {
            try await Task.sleep(for: .milliseconds(20))
        }
    }

    /// On the host that the guest comes to only the destination agent has the guest in its hands.
    private func recoverIncoming(
        _ id: String,
        _ guest: String,
        _ source: String,
        _ standing: DestinationStanding
    ) async throws -> Int32 {
        guard standing == .prepared else {
            throw MigrationError(.guest, "Migration \(id) has nothing to recover on this host; see 'crossdock status'")
        }
        guard takeOwnership else {
            output(
                """
                Guest '\(guest)' of migration \(id) is complete on this host and paused. It belongs to \(source) until that \
                releases it, and the destination agent waits for its word. If \(source) is gone for good and will never run \
                it again, run 'crossdock recover \(id) --take-ownership --other-host-is-off' here.

                """
            )
            return MigrationError.Code.undecided.rawValue
        }
        var arguments: [String: JSONValue] = ["migration": .string(id), "by": .string(operatorName)]
        if otherHostIsOff { arguments["other-host-is-off"] = true }
        if let otherHostWasErased { arguments["other-host-was-erased"] = .string(otherHostWasErased) }
        let answer = try await ObjectCommand.ask(common, "take-ownership", .object(arguments))
        output("Guest '\(answer["guest"]?.string ?? guest)' belongs to this host and runs here.\n")
        return 0
    }
}

/// What a recovering process does, whoever started it.
enum Recovery {
    /// The process that recovers a migration now, or another one that works on it: `watchdog`, `agent`.
    static func process(of id: String, _ migrations: MigrationStore, _ role: MigrationFiles.Role = .recovery)
        -> EmulatorProcess?
    {
        guard let bytes = (try? DurableFile.read(migrations.files(of: id).process(role))) ?? nil,
            let process = JSONText.decode(EmulatorProcess.self, from: bytes), process.isRunning
        else { return nil }
        return process
    }

    /// Recovers a migration that started on this host. Returns the exit code.
    static func run(_ id: String, _ migrations: MigrationStore, takenBy operatorName: String? = nil) async throws
        -> Int32
    {
        guard let bytes = try DurableFile.read(migrations.files(of: id).plan),
            let order = JSONText.decode(SourceAgentOrder.self, from: bytes)
        else { throw MigrationError(.guest, "There is no migration '\(id)' that started on this host") }
        let outgoing = OutgoingMigration(
            plan: order.plan,
            credentials: try order.credentials(),
            loop: EventLoop(name: "control"),
            dataLoops: EventLoopGroup(name: "data")
        ) { event in
            if let message = event.message { printError("crossdock: \(message)") }
        }
        let report = try await outgoing.recover(takenBy: operatorName)
        switch report.outcome {
        case .migrated: output("Guest '\(order.plan.guest)' belongs to \(order.plan.host) and runs there.\n")
        case .rolledBack: output("Guest '\(order.plan.guest)' belongs to this host; migration \(id) was rolled back.\n")
        case .rehearsed: break
        case .undecided: output("Who owns guest '\(order.plan.guest)' is not known.\n")
        }
        return report.code
    }
}

/// Looks after a guest whose source agent dies; started by it.
struct SourceWatchdogCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "source-watchdog",
        abstract: "Resumes a guest whose source agent dies or stands still, and recovers its migration.",
        shouldDisplay: false
    )

    @Option var plan: String
    @Option var parent: Int32
    @Option var pipe: Int32
    @Option var monitor: Int32

    func run() async throws {
        guard let bytes = try DurableFile.read(plan),
            let order = JSONText.decode(SourceAgentOrder.self, from: bytes)
        else { throw ValidationError("\(plan) is no plan") }
        let loop = EventLoop(name: "watchdog")
        defer { loop.stop() }
        guard await SwitchoverWatchdog.watch(order.plan, parent: parent, pipe: pipe, monitor: monitor, on: loop) else {
            return
        }
        try await failing {
            let store = MigrationStore(stateDirectory: order.plan.stateDirectory)
            let code = try await Recovery.run(order.plan.id, store)
            unlink(store.files(of: order.plan.id).process(.agent))
            if code != 0 { throw ExitCode(code) }
        }
    }
}
