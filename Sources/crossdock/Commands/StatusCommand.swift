import ArgumentParser
import Emulator
import IO
import Migration
import Source

struct StatusCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "status",
        abstract: "Shows the migrations that this host knows, and what became of them.",
        discussion: """
            With --watch it ends as 'crossdock migrate' does, with its exit code. Times are in UTC; PAUSE is how long the guest was paused, \
            an upper bound.
            """
    )

    @OptionGroup var common: CommonOptions

    @Flag(help: "Print JSON; with --watch one event a line.")
    var json = false

    @Flag(help: "Show a migration that is under way until it has ended. Ctrl-C ends the watching only.")
    var watch = false

    @Argument(help: "With --watch: the migration or its guest; without it the only one that is under way.")
    var name: String?

    struct Row: Codable {
        var migration: String
        var guest: String
        var role: String
        var state: String
        var detail: String
        /// When it began, in UTC.
        var began: String?
        /// How long it took, in milliseconds.
        var total_ms: Double?
        /// How long the guest was paused, in milliseconds.
        var blackout_ms: Double?
        /// How far the phase under way is.
        var percent: Double?
    }

    func validate() throws {
        if name != nil, !watch { throw ValidationError("A migration is named for --watch only") }
    }

    /// Follows a migration as its own command does.
    private func follow() async throws {
        let follower = try MigrationFollower(finding: name, stateDirectory: common.stateDirectory)
        var renderer: any EventRenderer =
            json
            ? JSONRenderer()
            : ProgressRenderer(destination: follower.destination, stateDirectory: common.stateDirectory)
        var report: MigrationReport?
        for try await event in follower.events() {
            renderer.render(event)
            report = event.report ?? report
        }
        renderer.finish()
        guard let report else {
            throw MigrationError(
                .undecided,
                "Nobody works on migration \(follower.migration) any more, and there is no report; see 'crossdock status'"
            )
        }
        if report.code != 0 { throw ExitCode(report.code) }
    }

    func run() async throws {
        try await failing {
            try common.checkAccess()
            if watch { return try await follow() }
            let cordon: String?
            do {
                cordon = try Cordon.read(stateDirectory: common.stateDirectory).map {
                    "This host takes no new guests, it is \($0.sentence)"
                }
            } catch { cordon = "\(error)" }
            if let cordon {
                // The JSON is about migrations.
                if json { printError("crossdock: \(cordon)") } else { output("\(cordon).\n") }
            }
            let rows = try common.migrations.ids().compactMap { try row($0) }
            if json {
                output(String(decoding: try JSONText.encode(rows, pretty: true), as: UTF8.self) + "\n")
            } else if rows.isEmpty {
                output("No migrations \(common.place).\n")
            } else {
                output(
                    Table.render(
                        ["MIGRATION", "GUEST", "ROLE", "STATE", "BEGAN", "TOOK", "PAUSE", "DETAIL"],
                        rows.map {
                            [
                                $0.migration, $0.guest, $0.role, $0.state, $0.began ?? "-",
                                $0.total_ms.map { ProgressRenderer.time($0 / 1000) } ?? "-",
                                $0.blackout_ms.map { "\(Int($0.rounded())) ms" } ?? "-", $0.detail,
                            ]
                        }
                    )
                )
            }
        }
    }

    private func row(_ id: String) throws -> Row? {
        let reading: JournalReading?
        do { reading = try common.migrations.reading(of: id) } catch let error as JournalError {
            return Row(
                migration: id,
                guest: error.records.first?.guest ?? "?",
                role: "?",
                state: "unreadable",
                detail: error.description
            )
        }
        guard let reading else { return nil }
        let (role, state, detail): (String, String, String)
        switch reading.standing {
        case .source(let standing):
            role = "source"
            let (known, words) = describe(standing, id, of: reading.guest, to: reading.peer)
            (state, detail) = (known, words + (standing.isOver ? "" : frozen(reading.guest)))
        case .destination(let standing):
            role = "destination"
            (state, detail) = describe(standing, of: reading.guest, from: reading.peer)
        }
        var row = Row(migration: id, guest: reading.guest, role: role, state: state, detail: detail)
        row.began = MigrationStore.began(id).map(UTCTime.text)
        guard case .source(let standing) = reading.standing else { return row }
        let files = common.migrations.files(of: id)
        if let bytes = (try? DurableFile.read(files.report)) ?? nil, let report = try? MigrationReport(parsing: bytes) {
            row.total_ms = report.totalMS
            row.blackout_ms = report.blackoutMS
        } else if !standing.isOver {
            row.percent = progress(files)?.percent
        }
        return row
    }

    /// How far a migration is that is under way.
    private func progress(_ files: MigrationFiles) -> MigrationEvent? {
        ((try? DurableFile.read(files.progress)) ?? nil).flatMap { MigrationEvent(parsing: $0) }
    }

    private func frozen(_ guest: String) -> String {
        guard let process = (try? common.guests.load(guest))??.process, process.isFrozen else { return "" }
        return "; its QEMU, process \(process.pid), is frozen"
    }

    private func describe(
        _ standing: SourceStanding,
        _ id: String,
        of guest: String,
        to destination: String
    ) -> (String, String) {
        let files = common.migrations.files(of: id)
        let isRecovering = files.running(.recovery) != nil
        let isAtWork = isRecovering || files.running(.agent) != nil
        switch standing {
        case .rolledBack(let reason): return ("rolled back", reason)
        case .confirmed: return ("migrated", "belongs to \(destination)")
        case .taken(let by):
            return (
                "taken",
                mayRunTwice(files)
                    ? "belongs to this host by the word of \(by), and \(destination) has it as well: both may run it. End the one that "
                        + "shall not go on"
                    : "belongs to this host by the word of \(by); \(destination) does not know it yet, 'crossdock recover \(id)' tells it"
            )
        case .overruled(let by):
            return ("overruled", overruled(guest, destination, by))
        case .released:
            let asking = isAtWork ? "it is being asked" : "'crossdock recover \(id)' asks it"
            return (
                "undecided",
                "released to \(destination), which has not confirmed that it has it; paused here, and must not be started; "
                    + "\(asking)\(lastWarning(id))"
            )
        case .open, .reclaimed:
            if isRecovering { return ("recovering", "the source agent ended; the guest belongs to this host") }
            if case .reclaimed = standing {
                return (
                    "interrupted",
                    "\(destination) will never run it; it belongs to this host, see 'crossdock recover'\(lastWarning(id))"
                )
            }
            if isAtWork {
                return ("migrating", "to \(destination)\(course(of: id))")
            }
            return (
                "interrupted",
                "the source agent ended; the guest belongs to this host, see 'crossdock recover'\(lastWarning(id))"
            )
        }
    }

    /// A guest that belongs to the other host by an operator's word, and may run here all the same.
    private func overruled(_ guest: String, _ host: String, _ by: String) -> String {
        let words = "belongs to \(host) by the word of \(by); it must not run here"
        guard let process = (try? common.guests.load(guest))??.process, process.isRunning, !process.isFrozen else {
            return words
        }
        return
            "\(words), and its QEMU is here, as process \(process.pid): both hosts may run it. End the one that shall not go on, here with "
            + "'crossdock guest stop \(guest)'"
    }

    /// Whether the last recovery found that the other host had taken the guest as well.
    private func mayRunTwice(_ files: MigrationFiles) -> Bool {
        guard let bytes = (try? DurableFile.read(files.report)) ?? nil,
            let report = try? MigrationReport(parsing: bytes)
        else { return false }
        return report.code == MigrationError.Code.undecided.rawValue
    }

    private func describe(_ standing: DestinationStanding, of guest: String, from source: String) -> (String, String) {
        switch standing {
        case .rolledBack(let reason): ("rolled back", reason)
        case .taken(let by, _): ("taken", "belongs to this host by the word of \(by)")
        case .overruled(let by): ("overruled", overruled(guest, source, by))
        case .owner: ("owned", "came from \(source)")
        case .prepared: ("prepared", "waiting for the word of \(source); it must not be resumed by hand")
        case .accepted: ("receiving", "from \(source)")
        }
    }

    /// Where a migration is: its phase, and how far that is.
    private func course(of id: String) -> String {
        guard let phase = lastPhase(id) else { return "" }
        var text = ", phase \(phase)"
        if let progress = progress(common.migrations.files(of: id)), progress.phase == phase,
            let percent = progress.percent
        {
            text += ", \(Int(percent)) %"
            if let remaining = progress.remaining, remaining < 360_000 {
                text += ", \(ProgressRenderer.time(remaining)) left"
            }
        }
        return text
    }

    private func lastPhase(_ id: String) -> String? { last(\.phase, id) }

    /// What the agent has said last, for a migration that does not go on by itself.
    private func lastWarning(_ id: String) -> String { last(\.message, id).map { ". It said last: \($0)" } ?? "" }

    private func last(_ member: @escaping (MigrationEvent) -> String?, _ id: String) -> String? {
        guard let bytes = try? DurableFile.read(common.migrations.files(of: id).events) else { return nil }
        return bytes.split(separator: UInt8(ascii: "\n")).reversed().lazy
            .compactMap { MigrationEvent(parsing: Array($0)).flatMap(member) }.first
    }
}
