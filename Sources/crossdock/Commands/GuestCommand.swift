import ArgumentParser
import Emulator
import IO
import Migration
import Source

struct GuestCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "guest",
        abstract: "Starts, adopts, lists, stops and removes guests on this host, and forgets those that have left.",
        subcommands: [
            Start.self, Adopt.self, List.self, Show.self, Set.self, Stop.self, Remove.self, Forget.self, Prune.self,
            Autostart.self,
        ]
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
                try common.checkAccess(forWriting: true)
                let described =
                    command.isEmpty ? nil : GuestCommandLine(arguments: command, directory: currentDirectory)
                let started = try await GuestLife(stateDirectory: common.stateDirectory).start(name, described)
                if let warning = started.warning { printError("crossdock: warning: \(warning)") }
                output("Guest '\(name)' runs as process \(started.process).\n")
            }
        }
    }

    struct Adopt: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Takes up a running QEMU that something else started.",
            discussion: """
                Its command line is read from /proc, and what was plugged in since from QEMU. Nothing of the guest is changed, and \
                whoever started it goes on as before.
                """
        )
        @OptionGroup var common: CommonOptions
        @Argument(help: "What the guest shall be called here.")
        var name: String
        @Option(help: ArgumentHelp("Its QMP monitor, a Unix socket.", valueName: "socket"))
        var qmp: String

        func run() async throws {
            try await failing {
                if let known = try common.guests.load(name), let sentence = common.migrations.frozenSentence(of: known)
                {
                    throw GuestError(sentence)
                }
                guard let lock = try common.migrations.lock(guest: name) else {
                    throw MigrationError(.busy, "Guest '\(name)' is being migrated; see 'crossdock status'")
                }
                defer { withExtendedLifetime(lock) {} }
                let bar = try common.migrations.startBar(of: name)
                if let bar, case .arriving = bar { throw GuestError(bar.sentence(guest: name)) }
                let socket = DurableFile.resolve(qmp, in: currentDirectory)
                let store = common.guests
                let name = name
                let loop = EventLoop(name: "guest")
                let view = try await loop.run {
                    let (record, monitor) = try await store.adopt(name, monitor: socket, on: loop)
                    defer { monitor?.close() }
                    return try await GuestView.make(record, state: nil, monitor: monitor, store)
                }
                output("Guest '\(name)' is process \(view.process ?? 0); it was not touched.\n")
                if let bar {
                    printError(
                        "crossdock: \(bar.sentence(guest: name)). If this QEMU is the same guest, it must not run"
                    )
                }
                if let monitor = view.monitor, monitor != socket {
                    printError("crossdock: \(socket) is held by another client; \(monitor) is used instead")
                }
                for blocker in view.blockers ?? [] {
                    printError("crossdock: it cannot be migrated as it is: \(blocker)")
                }
            }
        }
    }

    struct List: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Lists the guests of this host.")
        @OptionGroup var common: CommonOptions
        @Flag(help: "Print JSON.")
        var json = false

        func run() async throws {
            try await failing {
                let loop = EventLoop(name: "guest")
                let common = common
                try common.checkAccess()
                let views = try await loop.run {
                    var views: [GuestView] = []
                    for name in common.guests.names() {
                        guard let record = try? common.guests.load(name) else {
                            views.append(GuestView(damaged: name))
                            continue
                        }
                        views.append(try await GuestView.look(record, common.guests, common.migrations, on: loop))
                    }
                    return views
                }
                if json {
                    output(String(decoding: try JSONText.encode(views, pretty: true), as: UTF8.self) + "\n")
                } else if views.isEmpty {
                    output("No guests \(common.place).\n")
                } else {
                    output(
                        Table.render(
                            ["NAME", "STATE", "PROCESS", "MEMORY", "DISKS", "MIGRATION", "DETAIL"],
                            views.map(\.row)
                        )
                    )
                }
            }
        }
    }

    struct Show: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Shows what a guest is: its machine, its disks, and what keeps it from moving."
        )
        @OptionGroup var common: CommonOptions
        @Argument(help: "The guest's name.")
        var name: String
        @Flag(help: "Print JSON.")
        var json = false

        func run() async throws {
            try await failing {
                guard let record = try common.guests.load(name) else { throw common.guests.unknown(name) }
                let (store, migrations) = (common.guests, common.migrations)
                let loop = EventLoop(name: "guest")
                var view = try await loop.run { try await GuestView.look(record, store, migrations, on: loop) }
                await view.judgeFence(record, store, migrations)
                if record.placement?.console != nil {
                    view.console = await ConsoleQuery.ask(name, common.stateDirectory)
                }
                output(
                    json
                        ? String(decoding: try JSONText.encode(view, pretty: true), as: UTF8.self) + "\n"
                        : view.text + "\n"
                )
            }
        }
    }

    struct Forget: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Removes at once what a guest has left here that belongs to another host for good.",
            discussion: """
                Its old images are deleted, which are kept for --keep-source otherwise, its block devices are no longer held, and its \
                record goes. A guest that may belong to this host is refused.
                """
        )
        @OptionGroup var common: CommonOptions
        @Argument(help: "The guest's name.")
        var name: String

        func run() async throws {
            try await failing {
                let (deleted, remarks) = try LeftGuest(name, stateDirectory: common.stateDirectory).forget()
                for path in deleted { output("deleted \(path)\n") }
                for remark in remarks { printError("crossdock: \(remark)") }
                if remarks.isEmpty { output("Nothing of guest '\(name)' is kept on this host.\n") }
            }
        }
    }
}
