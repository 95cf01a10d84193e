import ArgumentParser
import Emulator
import IO
import Migration
import Source

struct GuestCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "guest",
        abstract: "Starts, adopts, lists and stops guests on this host, and forgets those that have left.",
        subcommands: [Start.self, Adopt.self, List.self, Show.self, Stop.self, Forget.self]
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
                if let bar = try common.migrations.startBar(of: name) { throw GuestError(bar.sentence(guest: name)) }
                if let stray = StrayImages.obstacles(of: name, common.migrations).first { throw GuestError(stray) }
                let known = try common.guests.load(name)
                if let known, let process = known.process, process.isRunning {
                    throw GuestError("Guest '\(name)' runs already, as process \(process.pid)")
                }
                var record: GuestRecord
                if command.isEmpty {
                    guard let known else {
                        throw GuestError("There is no guest '\(name)'; give its QEMU command line after '--'")
                    }
                    if let secrets = known.secrets {
                        throw GuestError(
                            "Guest '\(name)' needs the secrets \(secrets.joined(separator: ", ")), which are kept nowhere; give its "
                                + "command line again after '--', with an -object secret,id=ID,file=FILE for each"
                        )
                    }
                    if known.adopted != nil {
                        throw GuestError(
                            "Guest '\(name)' was started by something else, and is for that to start again; to start it here, give "
                                + "its command line after '--'"
                        )
                    }
                    record = known
                } else {
                    record = GuestRecord(
                        name: name,
                        commandLine: GuestCommandLine(arguments: command, directory: currentDirectory)
                    )
                    _ = try record.commandLine.paths()
                    if let secret = record.commandLine.clearSecrets.first {
                        throw GuestError(
                            "The secret '\(secret)' is in the command line in clear, where everybody on this host can read it; use "
                                + "file=, or encrypt it with 'crossdock secret encrypt'"
                        )
                    }
                }
                // The agent starts QEMU itself and keeps it; what would detach it or name it is left out.
                let store = common.guests
                let arguments = try record.commandLine.relocated(isAtHome: true) { .init(path: $0.path) }.arguments
                let isPaused = record.commandLine.has("S")
                var started = GuestRecord(
                    name: name,
                    commandLine: GuestCommandLine(arguments: arguments, directory: record.commandLine.directory)
                )
                // A guest whose command line another host wrote stays confined.
                started.confinement = record.confinement
                started.arrival = record.arrival
                let again = started
                let loop = EventLoop(name: "guest")
                let pid = try await loop.run {
                    var started = again
                    let monitor = try await store.start(&started, extra: isPaused ? ["-S"] : [], on: loop)
                    monitor.close()
                    if let process = started.process, let reason = await GuestScope.place(name, process) {
                        printError("crossdock: warning: \(reason)")
                    }
                    return started.process?.pid ?? 0
                }
                output("Guest '\(name)' runs as process \(pid).\n")
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
                    return try await GuestView.make(record, state: nil, monitor: monitor)
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
                    output("No guests on this host.\n")
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
                guard let record = try common.guests.load(name) else { throw GuestError("There is no guest '\(name)'") }
                let (store, migrations) = (common.guests, common.migrations)
                let loop = EventLoop(name: "guest")
                let view = try await loop.run { try await GuestView.look(record, store, migrations, on: loop) }
                output(
                    json
                        ? String(decoding: try JSONText.encode(view, pretty: true), as: UTF8.self) + "\n"
                        : view.text + "\n"
                )
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
                let wasRunning = try await stop()
                let guest = GuestWhereabouts(of: name, stateDirectory: common.stateDirectory)
                output(guest.sentence(guest: name, afterStop: wasRunning) + ".\n")
            }
        }

        /// Ends QEMU. Returns whether there was one.
        private func stop() async throws -> Bool {
            guard let record = try common.guests.load(name) else { throw GuestError("There is no guest '\(name)'") }
            guard let lock = try common.migrations.lock(guest: name) else {
                throw MigrationError(.busy, "Guest '\(name)' is being migrated; see 'crossdock status'")
            }
            defer { withExtendedLifetime(lock) {} }
            guard record.process?.isRunning == true else { return false }
            // What must not run here may be what the other host waits for.
            if let bar = try common.migrations.startBar(of: name), !bar.isDecided {
                throw GuestError(bar.sentence(guest: name))
            }
            let store = common.guests
            let loop = EventLoop(name: "guest")
            try await loop.run { await store.stop(record, on: loop) }
            return true
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
