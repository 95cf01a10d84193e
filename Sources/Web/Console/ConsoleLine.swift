internal import IO

/// The way to a reader of a console, which carries the frames of `ConsoleFrame`.
protocol ConsoleLine: Sendable {
    /// What the frames travel on.
    var channel: any Channel { get }
    /// The most bytes of an ending's reason.
    var mostReason: Int { get }
    /// Says that this end is there.
    func ping() async throws
    /// Says why no more comes, and ends this direction.
    func finish(_ ending: ConsoleReader.Ending) async throws
}

/// The websocket of a browser or of a command.
struct BrowserLine: ConsoleLine {
    let socket: WebSocketChannel
    var channel: any Channel { socket }
    var mostReason: Int { WebSocketChannel.mostReason }

    func ping() async throws { try await socket.ping() }
    func finish(_ ending: ConsoleReader.Ending) async throws {
        try await socket.finishWriting(code: ending.code, reason: ending.reason)
    }
}

/// The connection to another host's agent.
struct AgentLine: ConsoleLine {
    let channel: any Channel
    var mostReason: Int { ConsoleFrame.mostReason }

    func ping() async throws { try await channel.write(ConsoleFrame.note([]).encoded) }
    func finish(_ ending: ConsoleReader.Ending) async throws {
        try await channel.write(ConsoleFrame.end(code: ending.code, reason: ending.reason).encoded)
        try await channel.finishWriting()
    }
}
