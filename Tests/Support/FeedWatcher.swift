public import Emulator
public import IO
public import TLS

/// A viewer of an agent's page: the websocket of its feed, line by line. Confined to its loop.
public final class FeedWatcher: @unchecked Sendable {
    // Unchecked: confined to the loop.
    private let channel: WebSocketChannel
    private let lines: LineReader

    /// Connects. Called on the loop.
    ///
    /// - Parameters:
    ///   - address: where to.
    ///   - host: how the server is called, with its port; its page is where this comes from.
    ///   - credentials: a client's.
    ///   - cookie: that of a session.
    ///   - loop: the loop.
    public init(
        _ address: SocketAddress,
        _ host: String,
        _ credentials: any TLSCredentials,
        cookie: String,
        on loop: EventLoop
    ) async throws {
        let socket = try await SocketChannel.connect(to: address, on: loop)
        let tls = try await TLSChannel.handshake(over: socket, credentials: credentials, hostname: "localhost")
        channel = try await WebSocketChannel.connect(
            over: tls,
            host: host,
            path: "/events",
            fields: ["Origin": "https://\(host)", "Cookie": cookie]
        )
        lines = LineReader(channel, limit: 8 << 20)
    }

    /// The next line, which has to come within two minutes.
    public func next() async throws -> JSONValue {
        let line = try await channel.withDeadline(.seconds(120), for: "A line of the feed") { try await lines.next() }
        guard let line else { throw TestFailure("The feed has ended") }
        return try JSONValue(parsing: line)
    }

    /// The first lines: each section once, in their order.
    public func sections() async throws -> [String: JSONValue] {
        var found: [String: JSONValue] = [:]
        for name in ["host", "trouble", "moves", "evacuation", "guests", "history"] {
            let line = try await next()
            guard line["section"]?.string == name else { throw TestFailure("Not the section \(name): \(line.text)") }
            found[name] = line["value"] ?? .null
        }
        return found
    }

    /// The next state of a section that fulfils a condition; what comes before is handed to `others`.
    public func section(
        _ name: String,
        others: (JSONValue) -> Void = { _ in },
        _ condition: (JSONValue) -> Bool
    ) async throws -> JSONValue {
        let end = ContinuousClock.now + .seconds(120)
        while true {
            let line = try await next()
            guard ContinuousClock.now < end else { throw TestFailure("No such section '\(name)' within two minutes") }
            if line["section"]?.string == name, let value = line["value"], condition(value) { return value }
            others(line)
        }
    }

    /// The lines up to the first one that fulfils a condition, and that one.
    public func lines(until condition: (JSONValue) -> Bool) async throws -> [JSONValue] {
        let end = ContinuousClock.now + .seconds(120)
        var lines: [JSONValue] = []
        while true {
            lines.append(try await next())
            if let last = lines.last, condition(last) { return lines }
            guard ContinuousClock.now < end else { throw TestFailure("No such line within two minutes") }
        }
    }

    /// Ends it.
    public func close() { channel.close() }
}
