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
            try common.checkAccess()
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
            let (known, words) = describe(standing, id, to: reading.peer)
            (state, detail) = (known, words + (standing.isOver ? "" : frozen(reading.guest)))
        case .destination(let standing):
            role = "destination"
            (state, detail) = describe(standing, from: reading.peer)
        }
        return Row(migration: id, guest: reading.guest, role: role, state: state, detail: detail)
    }

    private func frozen(_ guest: String) -> String {
        guard let process = (try? common.guests.load(guest))??.process, process.isFrozen else { return "" }
        return "; its QEMU, process \(process.pid), is frozen"
    }

    private func describe(_ standing: SourceStanding, _ id: String, to destination: String) -> (String, String) {
        let files = common.migrations.files(of: id)
        let isRecovering = files.running(.recovery) != nil
        let isAtWork = isRecovering || files.running(.agent) != nil
        switch standing {
        case .rolledBack(let reason): return ("rolled back", reason)
        case .confirmed: return ("migrated", "belongs to \(destination)")
        case .taken(let by):
            return (
                "taken",
                "belongs to this host by the word of \(by); \(destination) does not know it yet, 'crossdock recover \(id)' tells it"
            )
        case .overruled(let by):
            return ("overruled", "belongs to \(destination) by the word of \(by); it must not run here")
        case .released:
            let asking = isAtWork ? "it is being asked" : "'crossdock recover \(id)' asks it"
            return (
                "undecided",
                "released to \(destination), which has not answered; paused here, and must not be started; \(asking)"
            )
        case .open, .reclaimed:
            if isRecovering { return ("recovering", "the source agent ended; the guest belongs to this host") }
            if case .reclaimed = standing {
                return (
                    "interrupted", "\(destination) will never run it; it belongs to this host, see 'crossdock recover'"
                )
            }
            if isAtWork {
                return ("migrating", "to \(destination)\(lastPhase(id).map { ", phase \($0)" } ?? "")")
            }
            return (
                "interrupted", "the source agent ended; the guest belongs to this host, see 'crossdock recover'"
            )
        }
    }

    private func describe(_ standing: DestinationStanding, from source: String) -> (String, String) {
        switch standing {
        case .rolledBack(let reason): ("rolled back", reason)
        case .taken(let by, _): ("taken", "belongs to this host by the word of \(by)")
        case .overruled(let by): ("overruled", "belongs to \(source) by the word of \(by); it must not run here")
        case .owner: ("owned", "came from \(source)")
        case .prepared: ("prepared", "waiting for the word of \(source); it must not be resumed by hand")
        case .accepted: ("receiving", "from \(source)")
        }
    }

    private func lastPhase(_ id: String) -> String? {
        guard let bytes = try? DurableFile.read(common.migrations.files(of: id).events) else { return nil }
        return bytes.split(separator: UInt8(ascii: "\n")).reversed().lazy
            .compactMap { MigrationEvent(parsing: Array($0))?.phase }.first
    }
}
