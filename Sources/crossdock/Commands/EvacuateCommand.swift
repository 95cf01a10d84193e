public import ArgumentParser
import Emulator
import Glibc
import IO
import Migration
public import Source

struct EvacuateCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "evacuate",
        abstract: "Moves every guest away from this host.",
        discussion: """
            Every guest is rehearsed with every target first, and nothing is moved when one of them cannot go, unless \
            --start-anyway says so. A process of its own does the work: Ctrl-C ends the watching, not the evacuation; \
            --cancel does. After a crash of that process 'crossdock evacuate --resume' goes on.

            Exit codes: 0 the host is empty; 20 some guests are left; 21 refused before the first one moved; 22 the \
            deadline is over; 23 cancelled; those of 'crossdock migrate' where nothing was begun.
            """
    )

    /// Who has cordoned a host that is emptied.
    static let cordoner = "crossdock evacuate"

    @OptionGroup var common: CommonOptions
    @OptionGroup var security: CredentialOptions

    @Option(
        help: ArgumentHelp(
            "Where they may go, the preferred first, separated by commas. May be repeated.",
            valueName: "host[:port]"
        )
    )
    var to: [String] = []

    @Flag(help: "Only look, and show what would be done.")
    var dryRun = false

    @Option(
        help: ArgumentHelp(
            "Only these: a guest's name, or a label KEY=VALUE. May be repeated.",
            valueName: "guest|label"
        )
    )
    var only: [String] = []

    @Option(
        help: ArgumentHelp("All but these; they do not count as left. May be repeated.", valueName: "guest|label")
    )
    var except: [String] = []

    @Option(help: ArgumentHelp("This one stays, and keeps nobody from beginning. May be repeated.", valueName: "guest"))
    var leave: [String] = []

    @Flag(help: "QEMUs that are no guests of Crossdock do not count.")
    var knownOnly = false

    @Flag(help: "Guests that are set to 'stop' may be stopped, and move so.")
    var stopOk = false

    @Option(
        help: ArgumentHelp(
            "How long such a guest may take to shut down: 90s, 5m.",
            default: TimeSpan.minutes(2),
            valueName: "time"
        ),
        transform: TimeSpan.parse
    )
    var stopPatience = TimeSpan.minutes(2)

    @Flag(help: "Move those that can move, whatever keeps the others.")
    var startAnyway = false

    @Flag(help: "Guests of one anti-affinity group may meet on a host when there is no other way.")
    var ignoreAffinity = false

    @Option(help: ArgumentHelp("How many guests' disks are copied at once.", valueName: "count"))
    var parallelCopies = 1

    @Option(
        help: ArgumentHelp("The most that all copies together may use; 0 for no limit.", valueName: "size/s"),
        transform: ByteCount.parse
    )
    var bandwidth = ByteCount(0)

    @Option(
        help: ArgumentHelp(
            "After this time no guest is begun, and what has not switched over stays: 90m, 2h.",
            valueName: "time"
        ),
        transform: TimeSpan.parse
    )
    var deadline: TimeSpan?

    @Option(
        help: ArgumentHelp(
            "Which guest goes first; priority is that with the highest number, and the largest among equals.",
            valueName: "largest|smallest|priority"
        )
    )
    var order: EvacuationOrder.Sequence = .priority

    @Option(help: ArgumentHelp("What follows when a guest could not be moved.", valueName: "continue|stop"))
    var onFailure: EvacuationOrder.Failure = .continue

    @OptionGroup var networks: NetworkOptions
    @OptionGroup var limits: MoveOptions

    @Flag(help: "Begin, and do not watch.")
    var detach = false

    @Flag(help: "Show an evacuation, by its id; the one that was begun or gone on with last without one.")
    var status = false
    @Flag(help: "Watch one that is under way.")
    var watch = false
    @Flag(help: "End one after the switchovers under way; copies are rolled back.")
    var cancel = false
    @Flag(help: "Go on with one whose process has ended.")
    var resume = false

    @Argument(help: "An evacuation's id, for --status, --watch, --cancel and --resume.")
    var id: String?

    @Flag(help: "Print JSON: events, one a line.")
    var json = false

    private var targetNames: [Substring] { to.flatMap { $0.split(separator: ",") } }

    func validate() throws {
        let actions = [status, watch, cancel, resume].filter { $0 }.count
        guard actions <= 1 else { throw ValidationError("--status, --watch, --cancel and --resume exclude each other") }
        if actions == 1 {
            guard to.isEmpty else { throw ValidationError("--to is for a new evacuation") }
            return
        }
        guard id == nil else {
            throw ValidationError("'\(id ?? "")' would be an evacuation's id; name hosts with --to, guests with --only")
        }
        guard !targetNames.isEmpty else { throw ValidationError("--to HOST says where the guests may go") }
        guard (1...64).contains(parallelCopies) else { throw ValidationError("--parallel-copies takes 1 to 64") }
        try MoveOptions.check(bandwidth: bandwidth)
        if let deadline, deadline.seconds == 0 { throw ValidationError("--deadline 0s is over already") }
        _ = try networks.bridges()
        try limits.check()
    }

    func run() async throws {
        try await failing {
            try common.checkAccess()
            let files = EvacuationFiles(stateDirectory: common.stateDirectory)
            if status || watch || cancel || resume { return try await continueOne(files) }
            if common.isBesideHostState {
                printError(
                    "crossdock: warning: Only guests of \(common.stateDirectory) are looked at; those of this host's own agent are in "
                        + "\(CommonOptions.hostStateDirectory), for root"
                )
            }
            if !dryRun { try EvacuationProcess.refuseSecond(stateDirectory: common.stateDirectory) }
            for other in EvacuationProcess.interrupted(stateDirectory: common.stateDirectory) {
                printError(
                    "crossdock: warning: Evacuation \(other) was interrupted and is not over; 'crossdock evacuate --resume \(other)' goes on "
                        + "with it, '--cancel \(other)' ends it"
                )
            }
            let id = MigrationStore.makeID()
            let survey = try await EvacuationSurvey.take(try makeOrder(), id: id, began: time(nil)) {
                [json] sentence in if !json { printError("crossdock: \(sentence)") }
            }
            EvacuationView.show(survey, json: json)
            guard survey.mayBegin else {
                let count = survey.obstacles.count
                printError(
                    "crossdock: Nothing was moved: \(count == 1 ? "one guest" : "\(count) guests") cannot go. Mend that, leave them with "
                        + "--leave or --except, or move the others with --start-anyway"
                )
                throw ExitCode(21)
            }
            if dryRun { return }
            try await begin(survey.evacuation, files)
        }
    }

    /// The host takes nobody new while it is emptied, and afterwards; when nothing could be begun it is as it was.
    private func begin(_ evacuation: Evacuation, _ files: EvacuationFiles) async throws {
        let state = common.stateDirectory
        let former = try Cordon.read(stateDirectory: state)
        if former == nil {
            try Cordon(by: Self.cordoner, message: "evacuation \(evacuation.id)").write(stateDirectory: state)
        }
        do { try EvacuationProcess.start(evacuation) } catch {
            if former == nil { try Cordon.remove(stateDirectory: state) }
            throw error
        }
        if detach { return output("\(evacuation.id)\n") }
        try await follow(evacuation.id, files)
    }

    private func continueOne(_ files: EvacuationFiles) async throws {
        let state = common.stateDirectory
        if resume, id == nil {
            guard let last = EvacuationProcess.interrupted(stateDirectory: state).last else {
                return output("No evacuation of this host was interrupted.\n")
            }
            try EvacuationProcess.resume(last, stateDirectory: state)
            if detach { return }
            return try await follow(last, files)
        }
        guard let id = id ?? files.latest else {
            throw MigrationError(.guest, "There was no evacuation of this host")
        }
        let plan = try files.load(id)
        if cancel {
            try EvacuationProcess.cancel(id, stateDirectory: state)
            if !json { printError("crossdock: Evacuation \(id) ends after the switchovers that are under way") }
        }
        if resume {
            try EvacuationProcess.resume(id, stateDirectory: state)
            if detach { return }
        }
        if status { return try EvacuationView.showStatus(plan, files, json: json) }
        try await follow(id, files)
    }

    private func follow(_ id: String, _ files: EvacuationFiles) async throws {
        SignalWatcher.start([SIGINT, SIGTERM]) { number in
            printError(
                "\ncrossdock: not watching any more; the evacuation goes on. 'crossdock evacuate --cancel \(id)' ends it"
            )
            Glibc.exit(128 + number)
        }
        let code = try await EvacuationView.watch(id, files, json: json)
        if code != 0 { throw ExitCode(code) }
    }

    private func makeOrder() throws -> EvacuationOrder {
        var plan = MigrationPlan(id: "", guest: "", host: "", port: 0, stateDirectory: common.stateDirectory)
        limits.fill(&plan)
        plan.bandwidth = bandwidth.value
        plan.networks = try networks.bridges().map { NetworkMap($0, isForMany: true) }
        let targets = try targetNames.map {
            try EvacuationOrder.Target(argument: String($0))
        }
        for (index, target) in targets.enumerated() where targets[..<index].contains(target) {
            throw MigrationError(.guest, "\(target) is named twice")
        }
        var order = EvacuationOrder(
            targets: targets,
            migration: plan,
            credentials: security.selection,
            directory: currentDirectory
        )
        order.only = only.map(selector)
        order.except = except.map(selector)
        order.leave = leave
        order.knownOnly = knownOnly
        order.mayStop = stopOk
        order.stopPatience = stopPatience.seconds
        order.startsAnyway = startAnyway
        order.ignoresAffinity = ignoreAffinity
        order.parallelCopies = parallelCopies
        order.deadline = deadline.map { time(nil) + $0.seconds }
        order.sequence = self.order
        order.onFailure = onFailure
        return order
    }

    /// A name has no equals sign.
    private func selector(_ text: String) -> EvacuationOrder.Selector {
        guard let sign = text.firstIndex(of: "=") else { return .guest(text) }
        return .label(key: String(text[..<sign]), value: String(text[text.index(after: sign)...]))
    }
}

extension EvacuationOrder.Sequence: ExpressibleByArgument {}
extension EvacuationOrder.Failure: ExpressibleByArgument {}

/// The process that coordinates an evacuation; started by 'crossdock evacuate'.
struct EvacuationAgentCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: EvacuationProcess.command,
        abstract: "Coordinates one evacuation; started by 'crossdock evacuate'.",
        shouldDisplay: false
    )

    @OptionGroup var common: CommonOptions
    @Argument var id: String

    func run() async throws {
        let code = try await failing {
            try await EvacuationProcess.run(id, stateDirectory: common.stateDirectory) {
                printError("crossdock: \($0)")
            }
        }
        if code != 0 { throw ExitCode(code) }
    }
}
