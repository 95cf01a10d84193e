public import IO
public import TLS

/// What a server answered.
public struct HTTPAnswer: Sendable {
    /// The status.
    public let status: Int
    /// The fields.
    public let fields: HTTPFields
    /// The body, as text.
    public let text: String
}

/// A client of HTTP/1.1 that sends what a test wants, byte for byte. Confined to its loop.
public final class HTTPClient: @unchecked Sendable {
    // Unchecked: confined to the loop.
    private let channel: any Channel
    private let buffer = IOBuffer(capacity: 64 << 10)
    private var rest: [UInt8] = []

    /// Takes a connected channel over.
    public init(over channel: any Channel) { self.channel = channel }

    /// Connects. Called on the loop.
    ///
    /// - Parameters:
    ///   - address: where to.
    ///   - credentials: a client's; nil for no TLS.
    ///   - loop: the loop.
    public static func connect(
        to address: SocketAddress,
        _ credentials: (any TLSCredentials)?,
        on loop: EventLoop
    ) async throws -> HTTPClient {
        let socket = try await SocketChannel.connect(to: address, on: loop)
        guard let credentials else { return HTTPClient(over: socket) }
        return HTTPClient(
            over: try await TLSChannel.handshake(over: socket, credentials: credentials, hostname: "localhost")
        )
    }

    /// Asks, and reads the answer.
    public func ask(
        _ method: String,
        _ path: String,
        _ fields: KeyValuePairs<String, String> = [:],
        body: String? = nil
    ) async throws -> HTTPAnswer {
        var text = "\(method) \(path) HTTP/1.1\r\n"
        for (name, value) in fields { text += "\(name): \(value)\r\n" }
        if let body { text += "Content-Length: \(body.utf8.count)\r\n" }
        try await channel.write(Array("\(text)\r\n\(body ?? "")".utf8))
        return try await answer(isHead: method == "HEAD")
    }

    /// Sends bytes as they are.
    public func send(_ text: String) async throws { try await channel.write(Array(text.utf8)) }

    /// Reads an answer.
    public func answer(isHead: Bool = false) async throws -> HTTPAnswer {
        while true {
            if let end = rest.withUnsafeBytes({ HTTPFields.endOfHead(in: $0) }) {
                let head = try HTTPResponseHead(parsing: Array(rest[..<end]))
                rest.removeFirst(end)
                let count = isHead ? 0 : Int(head.fields["content-length"] ?? "0") ?? 0
                while rest.count < count { try await fill() }
                defer { rest.removeFirst(count) }
                let body = String(decoding: rest[..<count], as: UTF8.self)
                return HTTPAnswer(status: head.status, fields: head.fields, text: body)
            }
            try await fill()
        }
    }

    private func fill() async throws {
        let count = try await channel.readSome(into: buffer.mutable(0..<buffer.capacity))
        guard count > 0 else { throw TestFailure("The server closed the connection") }
        rest.append(contentsOf: buffer.bytes(0..<count))
    }

    /// Whether the server ends the connection now, with nothing more to say.
    public func isEnded() async -> Bool {
        let count = try? await channel.readSome(into: buffer.mutable(0..<buffer.capacity))
        return count == nil || count == 0
    }

    /// Ends the connection.
    public func close() { channel.close() }
}
