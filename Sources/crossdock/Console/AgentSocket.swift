import Emulator
import Glibc
import IO
import Migration

/// The socket `console.sock` of this host's destination agent, for its user and root.
enum AgentSocket {
    /// Connects to it.
    ///
    /// - Throws: `MigrationError` that says whether there is no agent, or whether this user may not use it.
    static func connect(to path: String, on loop: EventLoop) async throws -> SocketChannel {
        do { return try await SocketChannel.connect(to: .unix(path: path), on: loop) } catch let error as ChannelError {
            guard access(path, W_OK) == 0 || errno != EACCES else {
                throw MigrationError(
                    .unreachable,
                    "This user may not open the consoles of the agent at \(path): give the command as root, or as the agent's user"
                )
            }
            throw MigrationError(
                .unreachable,
                "There is no running destination agent at \(path): \(error); start it with 'crossdock destination', or name its --state-dir"
            )
        }
    }

    /// Opens a websocket of the agent's.
    ///
    /// - Parameter target: the path and query, which nothing is done to.
    /// - Throws: as `connect`, `MigrationError` of the kind `guest` with the agent's words when it opens none.
    static func open(_ target: String, at path: String, on loop: EventLoop) async throws -> WebSocketChannel {
        let channel = try await connect(to: path, on: loop)
        do { return try await WebSocketChannel.connect(over: channel, host: "localhost", path: target) } catch let
            refusal
            as HTTPRefusal
        {
            throw MigrationError(.guest, refusal.sentence ?? "The agent answers with \(refusal.status)")
        }
    }

    /// Asks the agent by HTTP, on a connection of its own.
    ///
    /// - Parameter target: the path and query, which nothing is done to.
    /// - Returns: the status, and the body when it is JSON.
    /// - Throws: as `connect`, `MigrationError` when it answers nothing.
    static func ask(_ target: String, at path: String, on loop: EventLoop) async throws -> (
        status: Int, body: JSONValue?
    ) {
        let channel = try await connect(to: path, on: loop)
        defer { channel.close() }
        let request = "GET \(target) HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        let answer = try await channel.withDeadline(.seconds(10), for: "The agent's answer") {
            try await channel.write(Array(request.utf8))
            var bytes: [UInt8] = []
            let buffer = IOBuffer(capacity: 16 << 10)
            while bytes.count < 64 << 10 {
                let count = try await channel.readSome(into: buffer.mutable(0..<buffer.capacity))
                if count == 0 { break }
                bytes += buffer.bytes(0..<count)
            }
            return bytes
        }
        guard let end = answer.withUnsafeBytes({ HTTPFields.endOfHead(in: $0) }) else {
            throw MigrationError(
                .unreachable,
                "The agent at \(path) has closed the connection: it is for its own user and root"
            )
        }
        let head = try HTTPResponseHead(parsing: Array(answer[..<end]))
        return (Int(head.status), try? JSONValue(parsing: Array(answer[end...])))
    }
}
