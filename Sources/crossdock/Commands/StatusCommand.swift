import ArgumentParser
import Emulator
import IO
import Migration

struct StatusCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "status",
        abstract: "Shows the migrations that this host knows, and what became of them."
    )

    @OptionGroup var common: CommonOptions

    @Flag(help: "Print JSON.")
    var json = false

    struct Row: Codable {
        var migration: String
        var guest: String
        var role: String
        var state: String
        var detail: String
    }

    func run() async throws {
        try await failing {
            let rows = try common.migrations.ids().compactMap { try row($0) }
            if json {
                output(String(decoding: try JSONText.encode(rows, pretty: true), as: UTF8.self) + "\n")
            } else if rows.isEmpty {
                output("No migrations on this host.\n")
            } else {
                output(
                    Table.render(
                        ["MIGRATION", "GUEST", "ROLE", "STATE", "DETAIL"],
                        rows.map { [$0.migration, $0.guest, $0.role, $0.state, $0.detail] }
                    )
                )
            }
        }
    }

    private func row(_ id: String) throws -> Row? {
        let records: [JournalRecord]
        do { records = try Journal.read(common.migrations.journal(of: id)) } catch let error as JournalError {
            return Row(
                migration: id,
                guest: error.records.first?.guest ?? "?",
                role: "?",
                state: "unreadable",
                detail: error.description
            )
        }
        var taken: String?
        for case .taken(let name) in records { taken = name }
        let isRecovering = Recovery.process(of: id, common.migrations) != nil
        var rolledBack: String?
        for case .rolledBack(let reason) in records { rolledBack = reason }
        switch records.first {
        case .offered(let guest, let destination, _):
            let state: (String, String)
            if let rolledBack {
                state = ("rolled back", rolledBack)
            } else if records.contains(.confirmed) {
                state = ("migrated", "runs on \(destination)")
            } else if let taken {
                state = ("taken", "belongs to this host by the word of \(taken); see 'crossdock recover \(id)'")
            } else if records.isReleased {
                let asking =
                    isRecovering || isAgentRunning(id)
                    ? "it is being asked" : "'crossdock recover' asks it"
                state = (
                    "undecided",
                    "released to \(destination), which has not answered; paused here, and must not be started; \(asking)"
                )
            } else if isRecovering {
                state = ("recovering", "the source agent ended; the guest belongs to this host")
            } else if records.contains(.released) {
                state = (
                    "interrupted", "\(destination) will never run it; it belongs to this host, see 'crossdock recover'"
                )
            } else if isAgentRunning(id) {
                state = ("migrating", "to \(destination)\(lastPhase(id).map { ", phase \($0)" } ?? "")")
            } else {
                state = (
                    "interrupted", "the source agent ended; the guest belongs to this host, see 'crossdock recover'"
                )
            }
            return Row(migration: id, guest: guest, role: "source", state: state.0, detail: state.1)
        case .accepted(let guest, let source, _):
            let state: (String, String)
            if let rolledBack {
                state = ("rolled back", rolledBack)
            } else if let taken {
                state = ("taken", "belongs to this host by the word of \(taken)")
            } else if records.ownerDigests != nil {
                state = ("owned", "came from \(source)")
            } else if records.contains(.prepared) {
                state = ("prepared", "waiting for the word of \(source); it must not be resumed by hand")
            } else {
                state = ("receiving", "from \(source)")
            }
            return Row(migration: id, guest: guest, role: "destination", state: state.0, detail: state.1)
        default: return nil
        }
    }

    private func isAgentRunning(_ id: String) -> Bool { Recovery.process(of: id, common.migrations, "agent") != nil }

    private func lastPhase(_ id: String) -> String? {
        guard let bytes = try? DurableFile.read(common.migrations.events(of: id)) else { return nil }
        return bytes.split(separator: UInt8(ascii: "\n")).reversed().lazy
            .compactMap { MigrationEvent(parsing: Array($0))?.phase }.first
    }
}
