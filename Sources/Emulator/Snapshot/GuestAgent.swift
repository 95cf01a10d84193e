public import IO

/// The agent inside of a guest (`qemu-ga`), reached through a character device: it freezes and thaws file systems.
///
/// Confined to a loop. One client at a time: while something else holds the socket, there is no answer.
public final class GuestAgent: @unchecked Sendable {
    // Unchecked: confined to the channel's loop.
    private let channel: SocketChannel
    private let lines: LineReader

    private init(_ channel: SocketChannel) {
        self.channel = channel
        lines = LineReader(channel, limit: 1 << 20)
    }

    /// Connects to an agent's socket and makes sure that somebody answers.
    ///
    /// - Parameters:
    ///   - path: the socket of the character device.
    ///   - loop: the loop.
    ///   - timeout: how long the agent may take; the guest may have none.
    /// - Throws: `GuestError` when nobody answers.
    public static func connect(to path: String, on loop: EventLoop, timeout: Duration = .seconds(3)) async throws
        -> GuestAgent
    {
        let channel = try await SocketChannel.connect(to: .unix(path: path), on: loop, timeout: timeout)
        let agent = GuestAgent(channel)
        do {
            try await channel.withDeadline(timeout, for: "The guest agent's answer") {
                // What an earlier client did not read ends with the byte 0xff (guest-sync-delimited).
                let id = Int64.random(in: 1...1 << 40)
                try await agent.channel.write(
                    [0xff] + Array(#"{"execute":"guest-sync-delimited","arguments":{"id":\#(id)}}"#.utf8) + [10]
                )
                while let line = try await agent.lines.next() {
                    let text = line.lastIndex(of: 0xff).map { Array(line[($0 + 1)...]) } ?? line
                    if (try? JSONValue(parsing: text))?["return"]?.integer == id { return }
                }
                throw ChannelError(.closed, "The guest agent at \(path) ended the connection")
            }
        } catch {
            agent.close()
            throw GuestError("No guest agent answers at \(path): \(error)")
        }
        return agent
    }

    /// Runs a command of the agent.
    private func execute(_ command: String, timeout: Duration) async throws -> JSONValue {
        try await channel.withDeadline(timeout, for: "The guest agent's answer to \(command)") {
            try await channel.write(Array(#"{"execute":"\#(command)"}"#.utf8) + [10])
            while let line = try await lines.next() {
                guard let answer = try? JSONValue(parsing: line) else { continue }
                if let error = answer["error"] {
                    throw GuestError(
                        "The guest agent refused '\(command)': \(error["desc"]?.string ?? "no reason given")"
                    )
                }
                if let result = answer["return"] { return result }
            }
            throw ChannelError(.closed, "The guest agent ended the connection")
        }
    }

    /// Freezes the guest's file systems and returns how many (`guest-fsfreeze-freeze`).
    ///
    /// - Parameter timeout: how long it may take; the connection is of no use afterwards when the time is over.
    public func freeze(timeout: Duration = .seconds(10)) async throws -> Int {
        Int(try await execute("guest-fsfreeze-freeze", timeout: timeout).integer ?? 0)
    }

    /// Thaws them again and returns how many were frozen (`guest-fsfreeze-thaw`).
    @discardableResult
    public func thaw() async throws -> Int {
        Int(try await execute("guest-fsfreeze-thaw", timeout: .seconds(10)).integer ?? 0)
    }

    /// "thawed" or "frozen" (`guest-fsfreeze-status`).
    public func status() async throws -> String {
        try await execute("guest-fsfreeze-status", timeout: .seconds(5)).string ?? ""
    }

    /// Ends the connection; nothing is thawed by that.
    public func close() { channel.close() }
}
