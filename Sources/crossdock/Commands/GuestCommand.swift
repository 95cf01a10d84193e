import ArgumentParser
import Emulator
import IO
import Migration

struct GuestCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "guest",
        abstract: "Starts, lists and stops guests on this host.",
        subcommands: [Start.self, List.self, Show.self, Stop.self]
    )

    struct Start: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Starts a guest from its QEMU command line, or again from the one that is known.",
            discussion: "QEMU runs on when this command has ended. The command line is the guest's description."
        )
        @OptionGroup var common: CommonOptions
        @Argument(help: "The guest's name.")
        var name: String
        @Argument(parsing: .postTerminator, help: "The QEMU program and its arguments, after '--'.")
        var command: [String] = []

        func run() async throws {
            try await failing {
                try GuestStore.validate(name)
                guard let lock = try common.migrations.lock(guest: name) else {
                    throw MigrationError(.busy, "Guest '\(name)' is being migrated; see 'crossdock status'")
                }
                defer { withExtendedLifetime(lock) {} }
                if let release = try common.migrations.release(of: name) {
                    throw GuestError(
                        "Guest '\(name)' was released to \(release.destination) by migration \(release.migration) and runs "
                            + "there; it must not be started here"
                    )
                }
                if let arrival = try common.migrations.arrival(of: name) {
                    throw GuestError(
                        "Guest '\(name)' is arriving from \(arrival.source) by migration \(arrival.migration) and does not "
                            + "belong to this host yet; start 'crossdock destination', which finishes it or cleans up"
                    )
                }
                let known = try common.guests.load(name)
                if let known, let process = known.process, process.isRunning {
                    throw GuestError("Guest '\(name)' runs already, as process \(process.pid)")
                }
                var record: GuestRecord
                if command.isEmpty {
                    guard let known else {
                        throw GuestError("There is no guest '\(name)'; give its QEMU command line after '--'")
                    }
                    record = known
                } else {
                    record = GuestRecord(
                        name: name,
                        commandLine: GuestCommandLine(arguments: command, directory: currentDirectory)
                    )
                    _ = try record.commandLine.paths()
                }
                // The agent starts QEMU itself and keeps it; what would detach it or name it is left out.
                let store = common.guests
                let arguments = try record.commandLine.rewritten { $0.path }
                let isPaused = record.commandLine.has("S")
                let started = GuestRecord(
                    name: name,
                    commandLine: GuestCommandLine(arguments: arguments, directory: record.commandLine.directory)
                )
                let loop = EventLoop(name: "guest")
                let pid = try await loop.run {
                    var started = started
                    let monitor = try await store.start(&started, extra: isPaused ? ["-S"] : [], on: loop)
                    monitor.close()
                    return started.process?.pid ?? 0
                }
                output("Guest '\(name)' runs as process \(pid).\n")
            }
        }
    }

    struct List: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Lists the guests of this host.")
        @OptionGroup var common: CommonOptions
        @Flag(help: "Print JSON.")
        var json = false

        struct Row: Codable {
            var name: String
            var state: String
            var process: Int32?
            var detail: String
        }

        func run() async throws {
            try await failing {
                let loop = EventLoop(name: "guest")
                let common = common
                let rows = try await loop.run {
                    var rows: [Row] = []
                    for name in common.guests.names() {
                        guard let record = try? common.guests.load(name) else {
                            rows.append(
                                Row(name: name, state: "damaged", process: nil, detail: "its record cannot be read")
                            )
                            continue
                        }
                        let state = await common.guests.state(of: record, on: loop)
                        let isRunning = record.process?.isRunning ?? false
                        let detail = record.released.map { "released to \($0.destination), migration \($0.migration)" }
                        rows.append(
                            Row(
                                name: name,
                                state: state,
                                process: isRunning ? record.process?.pid : nil,
                                detail: isRunning ? record.commandLine.arguments[0] : detail ?? ""
                            )
                        )
                    }
                    return rows
                }
                if json {
                    output(String(decoding: try JSONText.encode(rows, pretty: true), as: UTF8.self) + "\n")
                } else if rows.isEmpty {
                    output("No guests on this host.\n")
                } else {
                    output(
                        Table.render(
                            ["NAME", "STATE", "PROCESS", "DETAIL"],
                            rows.map { [$0.name, $0.state, $0.process.map(String.init) ?? "-", $0.detail] }
                        )
                    )
                }
            }
        }
    }

    struct Show: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Prints what is known of a guest, as JSON.")
        @OptionGroup var common: CommonOptions
        @Argument(help: "The guest's name.")
        var name: String

        func run() async throws {
            try await failing {
                guard let record = try common.guests.load(name) else { throw GuestError("There is no guest '\(name)'") }
                output(String(decoding: try JSONText.encode(record, pretty: true), as: UTF8.self) + "\n")
            }
        }
    }

    struct Stop: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Ends a guest's QEMU. The guest is not asked: shut it down from within first."
        )
        @OptionGroup var common: CommonOptions
        @Argument(help: "The guest's name.")
        var name: String

        func run() async throws {
            try await failing {
                guard let record = try common.guests.load(name) else { throw GuestError("There is no guest '\(name)'") }
                guard let lock = try common.migrations.lock(guest: name) else {
                    throw MigrationError(.busy, "Guest '\(name)' is being migrated; see 'crossdock status'")
                }
                defer { withExtendedLifetime(lock) {} }
                let store = common.guests
                let loop = EventLoop(name: "guest")
                try await loop.run { await store.stop(record, on: loop) }
                output("Guest '\(name)' is stopped.\n")
            }
        }
    }
}
