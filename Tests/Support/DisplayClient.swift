public import IO
public import TLS
package import Web

/// A viewer of a guest's screen, over the websocket of an agent or over any other channel. It asks for pixels as they are, and keeps the picture.
/// Confined to its loop.
public final class DisplayClient: @unchecked Sendable {
    // Unchecked: confined to the loop.
    private let channel: any Channel
    private let buffer = IOBuffer(capacity: 64 << 10)
    private var queued: [UInt8] = []
    private var taken = 0
    /// The size of the screen.
    public private(set) var width = 0
    /// See `width`.
    public private(set) var height = 0
    /// The pixels, row by row, of four bytes each.
    public private(set) var picture: [UInt8] = []
    /// How many updates have come, and in them rectangles with pixels.
    public private(set) var updates = 0
    /// See `updates`.
    public private(set) var rectangles = 0
    /// The names that the desktop has had.
    public private(set) var names: [String] = []
    /// The sizes that the screen has had.
    public private(set) var sizes: [[Int]] = []

    /// What it asks for: pixels as they are, the size, the name, the cursor, the codes of keys; and streams that nobody may let through.
    package static let encodings: [Int32] = [16, 6, -312, -313, 0, -223, -307, -239, -258, -308]

    private init(_ channel: any Channel) { self.channel = channel }

    /// Connects to an agent over TLS, or without for nil. Called on the loop.
    public static func connect(
        _ address: SocketAddress,
        _ host: String,
        _ credentials: (any TLSCredentials)?,
        cookie: String? = nil,
        guest: String = "web1",
        query: String = "",
        on loop: EventLoop
    ) async throws -> DisplayClient {
        let socket = try await SocketChannel.connect(to: address, on: loop)
        let path = "/consoles/\(guest)/vnc\(query)"
        guard let credentials else {
            return try await shakeHands(try await WebSocketChannel.connect(over: socket, host: host, path: path))
        }
        let tls = try await TLSChannel.handshake(over: socket, credentials: credentials, hostname: "localhost")
        return try await shakeHands(
            try await WebSocketChannel.connect(
                over: tls,
                host: host,
                path: path,
                fields: ["Origin": "https://\(host)", "Cookie": cookie ?? "none=none"]
            )
        )
    }

    /// Performs the handshake, and says what it wants.
    public static func shakeHands(_ channel: any Channel) async throws -> DisplayClient {
        let client = DisplayClient(channel)
        var handshake = RFBClientHandshake()
        while handshake.outcome == nil {
            let count = try await channel.readSome(into: client.buffer.mutable(0..<4096))
            guard count > 0 else { throw TestFailure("The display was closed in the handshake") }
            let answer = try handshake.receive(client.buffer.bytes(0..<count))
            if !answer.isEmpty { try await channel.write(answer) }
        }
        client.queued = handshake.takeRest()
        guard let screen = handshake.outcome else { return client }
        client.resize(Int(screen.width), Int(screen.height))
        client.names = [screen.name]
        try await client.begin()
        return client
    }

    /// Connects to a port of an agent as viewers of VNC do: TLS begins inside of RFB (VeNCrypt, X509None).
    ///
    /// - Throws: `TestFailure` with what the agent has said when it refuses.
    public static func connect(
        vencrypt address: SocketAddress,
        _ credentials: any TLSCredentials,
        on loop: EventLoop
    ) async throws -> DisplayClient {
        let socket = try await SocketChannel.connect(to: address, on: loop)
        func expect(_ bytes: [UInt8]) async throws {
            let found = try await socket.read(exactly: bytes.count)
            guard found == bytes else { throw TestFailure("The agent has said \(found), not \(bytes)") }
        }
        try await expect(Array("RFB 003.008\n".utf8))
        try await socket.write(Array("RFB 003.008\n".utf8))
        try await expect([1, 19])
        try await socket.write([19])
        try await expect([0, 2])
        try await socket.write([0, 2])
        try await expect([0, 1, 0, 0, 1, 4])
        try await socket.write([0, 0, 1, 4])
        try await expect([1])
        let channel = try await TLSChannel.handshake(over: socket, credentials: credentials, hostname: "localhost")
        let result = try await channel.read(exactly: 4)
        guard result == [0, 0, 0, 0] else {
            let count = try await channel.read(exactly: 4).reduce(0) { $0 << 8 | Int($1) }
            throw TestFailure(String(decoding: try await channel.read(exactly: count), as: UTF8.self))
        }
        try await channel.write([1])
        let client = DisplayClient(channel)
        let head = try await channel.read(exactly: 24)
        client.resize(Int(head[0]) << 8 | Int(head[1]), Int(head[2]) << 8 | Int(head[3]))
        let count = head.suffix(4).reduce(0) { $0 << 8 | Int($1) }
        client.names = [String(decoding: try await channel.read(exactly: count), as: UTF8.self)]
        try await client.begin()
        return client
    }

    private func begin() async throws {
        let format = try PixelFormat([32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0])
        try await send(.setPixelFormat(format))
        try await send(.setEncodings(Self.encodings.map { RFBEncoding(rawValue: $0) }))
    }

    /// Says something.
    package func send(_ message: RFBClientMessage) async throws { try await channel.write(message.bytes) }

    /// Asks for the picture, or for what has changed.
    public func ask(isIncremental: Bool = true) async throws {
        let area = RFBRectangle(width: UInt16(width), height: UInt16(height))
        try await send(.updateRequest(isIncremental: isIncremental, area))
    }

    /// Presses a key or lets go of it, by its symbol and its code.
    public func key(_ symbol: UInt32, _ code: UInt32, isDown: Bool) async throws {
        try await send(.extendedKey(isDown: isDown, symbol: symbol, code: code))
    }

    /// The code and the reason with which the agent has closed.
    public var closing: (code: UInt16?, reason: String) {
        let channel = channel as? WebSocketChannel
        return (channel?.peerCloseCode, channel?.peerCloseReason ?? "")
    }

    /// Reads updates, asking for the next after each, until a condition holds, which has to be within two minutes.
    public func read(_ what: String, until condition: (DisplayClient) -> Bool) async throws {
        try await channel.withDeadline(.seconds(120), for: what) {
            while !condition(self) {
                try await takeMessage()
                try await ask()
            }
        }
    }

    /// Reads until the agent closes.
    public func readToTheEnd() async throws {
        do { try await read("the end") { _ in false } } catch is TestFailure {} catch let error as ChannelError
            where error.code != .timedOut
        {}
    }

    /// Ends it.
    public func close() { channel.close() }

    private func resize(_ width: Int, _ height: Int) {
        (self.width, self.height) = (width, height)
        sizes.append([width, height])
        picture = [UInt8](repeating: 0, count: width * height * 4)
    }

    private func bytes(_ count: Int) async throws -> ArraySlice<UInt8> {
        while queued.count - taken < count {
            if taken > 1 << 16 {
                queued.removeFirst(taken)
                taken = 0
            }
            let got = try await channel.readSome(into: buffer.mutable(0..<buffer.capacity))
            guard got > 0 else { throw TestFailure("The display was closed") }
            queued += buffer.bytes(0..<got)
        }
        defer { taken += count }
        return queued[taken..<(taken + count)]
    }

    private func number(_ count: Int) async throws -> Int { try await bytes(count).reduce(0) { $0 << 8 | Int($1) } }

    private func takeMessage() async throws {
        let type = try await number(1)
        guard type == 0 else { throw TestFailure("The display has said \(type)") }
        _ = try await number(1)
        for _ in 0..<(try await number(2)) { try await takeRectangle() }
        updates += 1
    }

    private func takeRectangle() async throws {
        let (x, y) = (try await number(2), try await number(2))
        let (width, height) = (try await number(2), try await number(2))
        let encoding = Int32(truncatingIfNeeded: try await number(4))
        switch encoding {
        case 0:
            guard x + width <= self.width, y + height <= self.height else {
                throw TestFailure("Pixels are off the screen")
            }
            for row in y..<(y + height) {
                let start = (row * self.width + x) * 4
                picture.replaceSubrange(start..<(start + 4 * width), with: try await bytes(4 * width))
            }
            rectangles += 1
        case -223: resize(width, height)
        case -308:
            _ = try await bytes(4 + 16 * (try await number(1)) - 1)
            if width != self.width || height != self.height { resize(width, height) }
        case -239: _ = try await bytes(width * height * 4 + (width + 7) / 8 * height)
        case -258: break
        case -307: names.append(String(decoding: try await bytes(try await number(4)), as: UTF8.self))
        default: throw TestFailure("A rectangle is in the encoding \(encoding)")
        }
    }
}
