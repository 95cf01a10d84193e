import Destination
import Emulator
import IO
import Migration

/// The control socket of the running destination agent, as its commands use it.
enum DestinationMonitor {
    /// Asks the agent of a state directory for one thing.
    ///
    /// - Throws: `MigrationError` when there is no agent, `QMPError` when it refuses.
    static func ask(
        _ stateDirectory: String,
        _ command: String,
        _ arguments: JSONValue
    ) async throws -> JSONValue {
        let loop = EventLoop(name: "monitor")
        defer { loop.stop() }
        return try await loop.run {
            let client: QMPClient
            do {
                client = try await QMPClient.connect(
                    to: ControlSocket.path(stateDirectory: stateDirectory),
                    on: loop,
                    speaker: "The destination agent"
                )
            } catch let error as ChannelError {
                throw MigrationError(
                    .unreachable,
                    "There is no running destination agent for \(stateDirectory): \(error)"
                )
            }
            defer { client.close() }
            return try await client.execute(command, arguments)
        }
    }
}
