import ArgumentParser
import Destination
import Emulator
import IO
import Migration
import Web

/// The page of the running agent.
struct WebCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "web",
        abstract: "Opens the page of the running destination agent.",
        subcommands: [Ticket.self]
    )

    struct Ticket: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Prints a URL that opens the agent's page once, for a browser anywhere.",
            discussion: """
                The agent has to run with --web. The secret is behind the '#', which browsers send to nobody; who opens the URL first is \
                signed in for 12 hours.
                """
        )
        @OptionGroup var common: CommonOptions
        @Option(help: ArgumentHelp("Only of this guest: nothing of others is shown.", valueName: "guest"))
        var guest: String?
        @Flag(help: "Look, and change nothing.")
        var viewOnly = false
        @Option(
            help: ArgumentHelp(
                "How long it may take until it is opened: 60s, 10m; at most 1h.",
                default: TimeSpan.minutes(1),
                valueName: "time"
            ),
            transform: TimeSpan.parse
        )
        var ttl = TimeSpan.minutes(1)

        func validate() throws {
            guard (1...3600).contains(ttl.seconds) else { throw ValidationError("--ttl takes 1s to 1h") }
        }

        func run() async throws {
            try await failing {
                if let guest { try GuestStore.validate(guest) }
                let url = try await WebTicketCommand.ask(
                    common.stateDirectory,
                    guest: guest,
                    viewOnly: viewOnly,
                    seconds: Int64(ttl.seconds)
                )
                output("\(url)\n")
            }
        }
    }
}

/// The command of the control socket behind `crossdock web ticket`.
enum WebTicketCommand {
    static let name = "web-ticket"

    /// Asks the running agent for a ticket. Returns the URL with it.
    static func ask(_ stateDirectory: String, guest: String?, viewOnly: Bool, seconds: Int64) async throws -> String {
        var arguments: [String: JSONValue] = [
            "by": .string(operatorName), "view-only": .bool(viewOnly), "seconds": .integer(seconds),
        ]
        if let guest {
            let store = GuestStore(stateDirectory: stateDirectory)
            guard store.names().contains(guest) else { throw store.unknown(guest) }
            arguments["guest"] = .string(guest)
        }
        do {
            return try await DestinationMonitor.ask(stateDirectory, name, .object(arguments))["url"]?.string ?? ""
        } catch let error as QMPError { throw MigrationError(.failed, error.message) }
    }

    /// Answers it with the server that is there; before one is, and without --web, it says so.
    static func answering(_ server: @escaping @Sendable () -> WebServer?) -> ControlSocket.Command {
        { arguments in
            guard let server = server() else {
                throw MigrationError(
                    .failed,
                    "This agent has no page: start it with --web HOST:PORT (OPTIONS in /etc/crossdock/destination)"
                )
            }
            guard let by = arguments["by"]?.string, let seconds = arguments["seconds"]?.integer else {
                throw MigrationError(.failed, "Parameters 'by' and 'seconds' are needed")
            }
            let guest = arguments["guest"]?.string
            if let guest { try GuestStore.validate(guest) }
            let rights: WebRights = arguments["view-only"]?.bool == true ? .view : [.view, .act]
            let grant = WebGrant(name: by.shown(most: 200), rights: rights, guest: guest)
            let url = try await server.makeTicket(grant, life: .seconds(min(max(seconds, 0), 86400)))
            return ["url": .string(url)]
        }
    }
}
