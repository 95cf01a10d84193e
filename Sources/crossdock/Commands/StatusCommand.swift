import ArgumentParser
import Emulator
import IO
import Migration
import Source
import TLS
import Web

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

    @Flag(
        help:
            "Print figures for Prometheus, as far as the state directory tells: for the textfile collector of node_exporter."
    )
    var metrics = false

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
        if metrics, watch || json { throw ValidationError("--metrics, --watch and --json exclude each other") }
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
            if metrics { return output(figures) }
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

    private var figures: String {
        let state = common.stateDirectory
        return HostMetrics.text(
            of: WebHost(
                name: HostExamination.ownName,
                version: Crossdock.number,
                address: "",
                stateDirectory: state,
                imageDirectory: "\(state)/images",
                credentials: CredentialSelection().directory
            )
        )
    }

    private func row(_ id: String) throws -> Row? {
        guard let status = try MigrationStatus(of: id, in: common.migrations) else { return nil }
        var row = Row(
            migration: id,
            guest: status.guest,
            role: status.role.rawValue,
            state: status.state,
            detail: status.detail
        )
        if status.trouble == .unreadable { return row }
        row.began = status.began.map(UTCTime.text)
        guard status.role == .source else { return row }
        if let report = status.report {
            row.total_ms = report.totalMS
            row.blackout_ms = report.blackoutMS
        } else if !status.isOver {
            row.percent = status.progress?.percent
        }
        return row
    }
}
