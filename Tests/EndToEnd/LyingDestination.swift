import IO
import Migration
import TLS
import TestSupport

/// Somebody with the destination's key between a source and a real destination agent: what the destination says is put into other words, or
/// said before its time. All else is passed on.
final class LyingDestination: Sendable {
    /// What the source is told in the place of something that the destination has said.
    typealias Words = @Sendable (Message) -> [Message]

    let port: UInt16
    private let loop: EventLoop

    private init(_ loop: EventLoop, _ port: UInt16) { (self.loop, self.port) = (loop, port) }

    /// Begins to listen.
    ///
    /// - Parameters:
    ///   - lab: whose destination agent it stands before.
    ///   - spoils: from which byte on it changes what is sent to the destination's QEMU; nil for not at all.
    ///   - lane: what becomes of the number of a connection that brings a share of the memory.
    ///   - words: what becomes of a message on the first connection for messages; later ones are honest.
    static func start(
        _ lab: Lab,
        spoils: Int? = nil,
        lane: @escaping @Sendable (Int) -> Int = { $0 },
        words: @escaping Words = { [$0] }
    ) async throws -> LyingDestination {
        let (server, client) = (try lab.pki.credentials(.server), try lab.pki.credentials(.client))
        let destination = lab.controlPort
        let loop = EventLoop(name: "liar")
        let port = try await loop.run {
            let listener = try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
            let words = Once(words)
            Task(executorPreference: loop) {
                while let socket = try? await listener.accept() {
                    Task(executorPreference: loop) {
                        defer { socket.close() }
                        let near = try await TLSChannel.handshake(over: socket, credentials: server)
                        let inner = try await SocketChannel.connect(
                            to: .inet(host: "127.0.0.1", port: destination),
                            on: loop
                        )
                        defer { inner.close() }
                        let far = try await TLSChannel.handshake(
                            over: inner,
                            credentials: client,
                            hostname: "localhost"
                        )
                        try await pass(near, far, words, spoils, lane)
                    }
                }
            }
            return listener.address.port ?? 0
        }
        return LyingDestination(loop, port)
    }

    func stop() { loop.stop() }

    /// Words for one connection. Confined to the loop.
    private final class Once: @unchecked Sendable {
        private var words: Words?
        /// Whether the rehearsal, which has a stream of its own, is over.
        var isCopied = false
        init(_ words: @escaping Words) { self.words = words }
        func take() -> Words? {
            defer { words = nil }
            return words
        }
    }

    private static func pass(_ near: TLSChannel, _ far: TLSChannel, _ words: Once, _ spoils: Int?, _ lane: (Int) -> Int)
        async throws
    {
        guard case .hello(var content) = try await MessageConnection(near).receiveMessage() else { return }
        if words.isCopied, let number = content.lane?.number { content.lane?.number = lane(number) }
        try await MessageConnection(far).send(.hello(content))
        guard content.role == .control, let say = words.take() else {
            let spoils = content.role == .stream && words.isCopied ? spoils : nil
            return try await withThrowingTaskGroup(of: Void.self) { group in
                group.addTask(executorPreference: near.loop) { try await pump(far, near) }
                group.addTask(executorPreference: near.loop) { try await pump(near, far, spoils: spoils) }
                do { for try await _ in group {} } catch {
                    // Neither side may wait for what the other has left.
                    near.close()
                    far.close()
                    throw error
                }
            }
        }
        let questions = Task(executorPreference: near.loop) { try await pump(near, far) }
        let (source, destination) = (MessageConnection(near), MessageConnection(far))
        do {
            while true {
                switch try await destination.receive() {
                case .data(let data): try await source.send(data: data)
                case .message(let message):
                    if case .mirrored = message { words.isCopied = true }
                    for word in say(message) { try await source.send(word) }
                }
            }
        } catch {
            // What the source has not read yet would go with a socket that is closed while it still speaks.
            try await near.finishWriting()
            try? await questions.value
        }
    }

    private static func pump(_ from: TLSChannel, _ to: TLSChannel, spoils: Int? = nil) async throws {
        var passed = 0
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 64 << 10, alignment: 16)
        defer { buffer.deallocate() }
        while true {
            let count = try await from.readSome(into: buffer)
            guard count > 0 else { break }
            var bytes = Array(buffer[..<count])
            if let spoils, passed + count > spoils {
                for index in max(0, spoils - passed)..<count { bytes[index] ^= 0x5a }
            }
            passed += count
            try await to.write(bytes)
        }
        try await to.finishWriting()
    }
}
