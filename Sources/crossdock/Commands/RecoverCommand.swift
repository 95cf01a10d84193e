import ArgumentParser
import Emulator
import Glibc
import IO
import Migration
import Source

struct RecoverCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "recover",
        abstract: "Ends migrations whose agent has died, and says who owns the guest.",
        discussion: """
            What is done follows from the journal alone. Before the release the guest belongs to the host that it comes from: it \
            is cleaned up and resumed there. After it the destination is asked until it answers: it has the guest, or it will \
            never run it and the guest comes back.

            When the other host is gone for good, and nobody can be asked, --take-ownership makes the guest this host's. On the host \
            that the guest left the other one is asked first, at every address of its name; on the one that it came to only the other \
            one can make a connection, and nothing is taken while there is one. Silence is no proof that its copy does not run: say with \
            --other-host-is-off that the host is switched off. A host that answers is not off; only for one that was installed \
            anew, and has nothing of the guest any more, there is --other-host-was-erased. When that is wrong, both hosts run \
            the guest. It is written into the journal, with who decided, and the other host is told as soon as it can be reached.
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

    @Flag(
        help: """
            With --take-ownership: I vouch that the other host, which does not answer, is switched off and its copy never runs.
            """
    )
    var otherHostIsOff = false

    @Option(
        help: ArgumentHelp(
            """
            With --take-ownership: I vouch that the other host, of this name in 'crossdock status', was installed anew and has \
            nothing of the guest.
            """,
            valueName: "name"
        )
    )
    var otherHostWasErased: String?

    @OptionGroup var common: CommonOptions

    func validate() throws {
        if takeOwnership, migration == nil { throw ValidationError("--take-ownership needs the migration's id") }
        if !takeOwnership, otherHostIsOff || otherHostWasErased != nil {
            throw ValidationError("--other-host-is-off and --other-host-was-erased are for --take-ownership")
        }
    }

    private var recovery: Recovery {
        Recovery(stateDirectory: common.stateDirectory) { printError("crossdock: \($0)") }
    }

    func run() async throws {
        try await failing {
            // Before anything is asked of another host, which may take as long as that is away.
            try common.checkAccess()
            if migration == nil {
                for problem in DeviceHolder.holdAgain(common.migrations) { printError("crossdock: \(problem)") }
            }
            if let migration {
                let code = try await recover(migration)
                if code != 0 { throw ExitCode(code) }
                return
            }
            let ids = try recovery.pending()
            if ids.isEmpty {
                output(
                    "There is nothing to recover \(common.place), or somebody is at it already; see 'crossdock status'. What arrives here is "
                        + "recovered by 'crossdock destination'.\n"
                )
            }
            // One destination may be away for long, and the other guests are none of its business.
            let code = await withTaskGroup(of: Int32.self) { group in
                for id in ids {
                    group.addTask {
                        do { return try await self.recover(id) } catch {
                            printError("crossdock: migration \(id): \(error)")
                            return documentedCode(of: error)
                        }
                    }
                }
                return await group.reduce(0) { $0 == 0 ? $1 : $0 }
            }
            if code != 0 { throw ExitCode(code) }
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
        let report = try await recovery.recover(id, claim: claim)
        tell(report, reading.peer)
        return report.code
    }

    private func tell(_ report: MigrationReport, _ host: String) {
        let guest = "Guest '\(report.guest)'"
        switch report.outcome {
        case .migrated: output("\(guest) belongs to \(host), which has taken it over; nothing of it runs here.\n")
        case .rolledBack:
            guard report.code != MigrationError.Code.undecided.rawValue else {
                return output("\(guest) was taken for this host, and \(host) has it as well: both may run it.\n")
            }
            let how =
                isTaken(report.migration) ? "it was taken for it" : "migration \(report.migration) was rolled back"
            output("\(guest) belongs to this host; \(how).\n")
        case .overruled: output("\(guest) belongs to \(host): an operator has taken it there.\n")
        case .undecided: output("Who owns guest '\(report.guest)' is not known.\n")
        case .rehearsed: break
        }
    }

    private func isTaken(_ id: String) -> Bool {
        guard case .source(.taken) = ((try? common.migrations.reading(of: id)) ?? nil)?.standing else {
            return claim != nil
        }
        return true
    }

    /// What the operator in front of this terminal vouches for.
    private var claim: OwnershipClaim? {
        guard takeOwnership else { return nil }
        return OwnershipClaim(user: operatorName, isOtherHostOff: otherHostIsOff, erasedHost: otherHostWasErased)
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
        guard let claim else {
            output(
                """
                Guest '\(guest)' of migration \(id) has come to this host and belongs to \(source) until that releases it; \
                'crossdock destination' waits for its word. If \(source) is gone for good and will never run it again, run \
                'crossdock recover \(id) --take-ownership --other-host-is-off' here. A guest that was paused there is resumed then: \
                only \(source) could say that it was.

                """
            )
            return MigrationError.Code.undecided.rawValue
        }
        let answer: JSONValue
        do {
            let arguments = claim.arguments(migration: id)
            answer = try await DestinationMonitor.ask(common.stateDirectory, "take-ownership", arguments)
        } catch {
            // Whatever has kept the agent from it, the guest is where it was.
            throw MigrationError(.undecided, "\(error)")
        }
        let name = answer["guest"]?.string ?? guest
        var state = "unknown"
        if let record = try? common.guests.load(name) {
            let (store, loop) = (common.guests, EventLoop(name: "guest"))
            defer { loop.stop() }
            state = (try? await loop.run { await store.state(of: record, on: loop) }) ?? state
        }
        output("Guest '\(name)' belongs to this host; its state is '\(state)'.\n")
        return 0
    }
}
