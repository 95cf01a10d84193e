import Destination
import Emulator
import IO
import Migration
import Web

/// The command of the control socket that says who has the consoles of guests.
enum ConsoleQuery {
    static let name = "query-consoles"

    /// Answers it with the server that is there.
    static func answering(_ server: @escaping @Sendable () -> WebServer?) -> ControlSocket.Command {
        { _ in
            guard let server = server() else { return [] }
            return try JSONValue(parsing: try JSONText.encode(try await server.consoleStandings()))
        }
    }

    /// The command with which a source agent fetches what the guest's next host goes on with.
    static let tailName = "console-tail"

    /// Answers that one.
    static func answeringTail(_ server: @escaping @Sendable () -> WebServer?) -> ControlSocket.Command {
        { arguments in
            guard let guest = arguments["guest"]?.string, let heir = arguments["identity"]?.string,
                let tail = try await server()?.consoleTail(of: guest, for: heir)
            else {
                throw MigrationError(.failed, "The agent does not hold the console of such a guest")
            }
            return try JSONValue(parsing: try JSONText.encode(tail))
        }
    }

    /// The command with which a source agent says that a guest has gone to the host of an identity.
    static let leftName = "console-left"

    /// Answers that one.
    static func answeringLeft(
        _ server: @escaping @Sendable () -> WebServer?,
        _ agent: @escaping @Sendable () -> DestinationAgent?
    ) -> ControlSocket.Command {
        { arguments in
            if let guest = arguments["guest"]?.string, let identity = arguments["identity"]?.string {
                try await agent()?.forgetGrant(of: identity, for: guest)
            }
            await server()?.lookForConsoles()
            return [:]
        }
    }

    /// The command with which a source agent keeps what is typed from a guest that is about to be paused, or lets it have that again.
    static let stillName = "console-still"

    /// Answers that one.
    static func answeringStill(_ server: @escaping @Sendable () -> WebServer?) -> ControlSocket.Command {
        { arguments in
            guard let guest = arguments["guest"]?.string, let still = arguments["still"]?.bool else { return [:] }
            await server()?.keepConsoleStill(still, of: guest)
            return [:]
        }
    }

    /// The command with which a source agent has keys let go of before it pauses a guest.
    static let releaseName = "release-input"

    /// Answers that one, once nothing is down any more.
    static func answeringRelease(_ server: @escaping @Sendable () -> WebServer?) -> ControlSocket.Command {
        { arguments in
            guard let guest = arguments["guest"]?.string else {
                throw MigrationError(.failed, "The parameter 'guest' is needed")
            }
            await server()?.releaseInput(of: guest)
            return [:]
        }
    }

    /// What the running agent says of a guest's console; nil when it holds none, or there is no agent.
    static func ask(_ guest: String, _ stateDirectory: String) async -> ConsoleStanding? {
        guard let answer = try? await DestinationMonitor.ask(stateDirectory, name, [:]) else { return nil }
        let standings = JSONText.decode([ConsoleStanding].self, from: Array(answer.text.utf8)) ?? []
        return standings.first { $0.guest == guest }
    }

    /// Who has it, for people.
    ///
    /// - Parameters:
    ///   - standing: what the running agent says; nil when it says nothing, or there is none.
    ///   - guest: the guest.
    ///   - host: the host that the guest has gone to; nil for a guest that is here.
    static func words(_ standing: ConsoleStanding?, of guest: String, on host: String?) -> String {
        guard let standing else {
            guard let host else { return "no running agent holds it" }
            return
                "with the guest on \(host); 'crossdock console \(guest)' reads it from here when this host's agent runs and has a right there"
        }
        let readers = standing.readers == 1 ? "1 reader" : "\(standing.readers) readers"
        if let host = standing.host {
            guard standing.readers > 0 else {
                return "with the guest on \(host); 'crossdock console \(guest)' reads it from here"
            }
            guard standing.connected else {
                return "with the guest on \(host), \(readers) here: \(standing.reason ?? "it is not connected")"
            }
            return "passed on by \(host), \(readers)"
        }
        guard standing.connected else { return "not held: \(standing.reason ?? "the agent has not connected yet")" }
        return "held by the destination agent, \(readers)\(standing.writer.map { ", \($0) writes" } ?? "")"
    }
}
