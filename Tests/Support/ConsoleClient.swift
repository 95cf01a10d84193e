public import IO
public import TLS
public import Web

/// A reader of a guest's console over the web server's websocket. Confined to its loop.
public final class ConsoleClient: @unchecked Sendable {
    // Unchecked: confined to the loop.
    private let channel: WebSocketChannel
    private let buffer = IOBuffer(capacity: 64 << 10)
    private var parser = ConsoleFrame.Parser()
    /// What was read, without gaps, and the offset of its first byte.
    public private(set) var bytes: [UInt8] = []
    /// See `bytes`.
    public private(set) var start: UInt64 = 0
    /// How often output did not begin where the output before it ended.
    public private(set) var gaps = 0
    /// What was said last.
    public private(set) var standing: ConsoleStanding?
    /// All notices.
    public private(set) var notices: [String] = []

    /// Connects over TLS, or without for nil. Called on the loop.
    public init(
        _ address: SocketAddress,
        _ host: String,
        _ credentials: (any TLSCredentials)?,
        cookie: String? = nil,
        guest: String = "web1",
        query: String = "",
        on loop: EventLoop
    ) async throws {
        let socket = try await SocketChannel.connect(to: address, on: loop)
        let path = "/consoles/\(guest)/serial\(query)"
        guard let credentials else {
            channel = try await WebSocketChannel.connect(over: socket, host: host, path: path)
            return
        }
        let tls = try await TLSChannel.handshake(over: socket, credentials: credentials, hostname: "localhost")
        channel = try await WebSocketChannel.connect(
            over: tls,
            host: host,
            path: path,
            fields: ["Origin": "https://\(host)", "Cookie": cookie ?? "none=none"]
        )
    }

    /// The offset behind what was read.
    public var end: UInt64 { start + UInt64(bytes.count) }
    /// What was read, as text.
    public var text: String { String(decoding: bytes, as: UTF8.self) }
    /// The code and the reason with which the server has closed.
    public var closing: (code: UInt16?, reason: String) { (channel.peerCloseCode, channel.peerCloseReason) }

    /// Reads until a condition holds, which has to be within two minutes.
    public func read(_ what: String, until condition: (ConsoleClient) -> Bool) async throws {
        try await channel.withDeadline(.seconds(120), for: what) {
            while !condition(self) {
                while let frame = try parser.next() { take(frame) }
                if condition(self) { return }
                let count = try await channel.readSome(into: buffer.mutable(0..<buffer.capacity))
                guard count > 0 else { throw TestFailure("The console was closed before \(what)") }
                parser.append(buffer.bytes(0..<count))
            }
        }
    }

    /// Reads until the server closes.
    public func readToTheEnd() async throws {
        do { try await read("the end") { _ in false } } catch is TestFailure {} catch let error as ChannelError
            where error.code == .closed
        {}
    }

    private func take(_ frame: ConsoleFrame) {
        switch frame {
        case .note(let note):
            standing = JSONText.decode(ConsoleStanding.self, from: note)
            if let notice = standing?.notice { notices.append(notice) }
        case .output(let offset, let new):
            if bytes.isEmpty { start = offset } else if offset != end { gaps += 1 }
            bytes += new
        case .input, .end: gaps += 1
        }
    }

    /// Asks to be the one who writes.
    public func wish(_ write: Bool = true) async throws {
        try await channel.write(ConsoleFrame.note(try JSONText.encode(ConsoleWish(write: write))).encoded)
    }

    /// Types.
    public func type(_ text: String) async throws {
        try await channel.write(ConsoleFrame.input(Array(text.utf8)).encoded)
    }

    /// Ends it.
    public func close() { channel.close() }
}
