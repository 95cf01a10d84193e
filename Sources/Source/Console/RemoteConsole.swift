public import IO
public import Migration
public import TLS

/// A console of a guest on another host, as that host's agent opens it.
public enum RemoteConsole {
    /// How long the other agent may take to open it, refusals among that.
    private static let patience = Duration.seconds(15)

    /// Asks the host to which a guest has gone for one of its consoles.
    ///
    /// - Parameters:
    ///   - departure: where the guest has gone, and what was given there.
    ///   - opening: what is wanted; the departure's grant is shown.
    ///   - credentials: a client's: those of the identity that gave the grant.
    ///   - loop: where the connection lives.
    /// - Returns: the connection, which carries the frames of the serial console, or the bytes of the display, from here on.
    /// - Throws: `MigrationError`: `unreachable` when nobody answers, `refused` with the other agent's words, `security`.
    public static func open(
        _ departure: ConsoleDeparture,
        _ opening: ConsoleOpening,
        credentials: any TLSCredentials,
        on loop: EventLoop
    ) async throws -> TLSChannel {
        let peer = ControlConnection.Peer(host: departure.host, port: departure.port, identity: departure.identity)
        let hello = Message.Hello(role: .console, migration: MigrationStore.makeID())
        let (channel, _) = try await ControlConnection.greet(peer, hello, credentials, loop)
        var question = opening
        question.grant = departure.grant
        do {
            let connection = MessageConnection(channel)
            connection.limit = 64 << 10
            return try await channel.withDeadline(patience, for: "Opening the console") {
                try await connection.send(.open(question))
                switch try await connection.receiveMessage() {
                case .opened: return channel
                case .abort(let reason):
                    throw MigrationError(
                        .refused,
                        "\(departure.host) answers: \(MigrationContext.said(reason))"
                    )
                default:
                    throw ChannelError(.protocolViolation, "\(departure.host) does not answer as it should")
                }
            }
        } catch {
            channel.close()
            if let error = error as? MigrationError { throw error }
            throw MigrationError(.unreachable, "The connection to \(departure.host) was lost: \(error)")
        }
    }
}
