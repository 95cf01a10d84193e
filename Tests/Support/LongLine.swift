internal import IO

/// A line between two hosts on which every byte takes its time: it forwards TCP connections, and hands on what it was given so much later.
///
/// As long as the kernel's buffers take what comes, its rate is not limited.
public final class LongLine: @unchecked Sendable {
    // Unchecked: confined to `loop`, but for `stop`.
    private let loop = EventLoop(name: "line")
    private let delay: Duration
    private let window: Int
    private var listeners: [Listener] = []
    private var connections: [Connection] = []
    private let pool = BufferPool()

    /// A forwarded connection.
    private struct Connection {
        let near: SocketChannel
        let far: SocketChannel
        /// Bytes that went to the far end.
        var sent = 0
    }

    /// What is under way.
    private final class Queue: @unchecked Sendable {
        // Unchecked: confined to the loop.
        var pieces: [(due: ContinuousClock.Instant, buffer: IOBuffer, count: Int)] = []
        var bytes = 0
        var hasEnded = false
        let changed = AsyncCondition()
    }

    /// Makes a line.
    ///
    /// - Parameters:
    ///   - near: the address that it listens at.
    ///   - far: the address that it forwards to.
    ///   - ports: at which ports, the same ones on both.
    ///   - roundTrip: what a byte there and one back take together.
    ///   - window: how many bytes of one direction of a connection may be under way.
    public init(
        from near: String,
        to far: String,
        ports: [UInt16],
        roundTrip: Duration,
        window: Int = .max
    ) async throws {
        delay = roundTrip / 2
        self.window = window
        for port in ports {
            let loop = loop
            let listener = try await loop.run {
                try await Listener.listen(on: .inet(host: near, port: port), loop: loop)
            }
            listeners.append(listener)
            Task(executorPreference: loop) {
                while let channel = try? await listener.accept() {
                    Task(executorPreference: loop) { await self.forward(channel, to: .inet(host: far, port: port)) }
                }
            }
        }
    }

    deinit { loop.stop() }

    /// Ends it.
    public func stop() {
        loop.execute {
            for listener in self.listeners { listener.close() }
            for index in self.connections.indices { self.cut(index) }
        }
    }

    /// Bytes that each connection, in the order in which they came, has carried towards the far end.
    public func sent() async throws -> [Int] { try await loop.run { self.connections.map(\.sent) } }

    /// Breaks a connection, by its place in `sent`.
    public func cut(connection index: Int) async throws { try await loop.run { self.cut(index) } }

    private func cut(_ index: Int) {
        let reason = ChannelError(.closed, "The line is cut")
        connections[index].near.abort(reason)
        connections[index].far.abort(reason)
    }

    private func forward(_ near: SocketChannel, to address: SocketAddress) async {
        guard let far = try? await SocketChannel.connect(to: address, on: loop) else { return near.close() }
        let index = connections.count
        connections.append(Connection(near: near, far: far))
        await withTaskGroup(of: Void.self) { group in
            for (source, target, isForward) in [(near, far, true), (far, near, false)] {
                let queue = Queue()
                group.addTask(executorPreference: loop) {
                    await self.read(source, queue) { if isForward { self.connections[index].sent += $0 } }
                }
                group.addTask(executorPreference: loop) { await self.write(target, queue) }
            }
        }
        near.close()
        far.close()
    }

    private func read(_ source: SocketChannel, _ queue: Queue, _ count: (Int) -> Void) async {
        while true {
            while queue.bytes >= window { await queue.changed.wait() }
            let buffer = pool.buffer(64 << 10)
            guard let read = try? await source.readSome(into: buffer.mutable(0..<(64 << 10))), read > 0 else { break }
            count(read)
            queue.pieces.append((.now + delay, buffer, read))
            queue.bytes += read
            queue.changed.signal()
        }
        queue.hasEnded = true
        queue.changed.signal()
    }

    private func write(_ target: SocketChannel, _ queue: Queue) async {
        while true {
            while queue.pieces.isEmpty {
                if queue.hasEnded { return _ = try? await target.finishWriting() }
                await queue.changed.wait()
            }
            let piece = queue.pieces.removeFirst()
            let rest = piece.due - .now
            if rest > .zero { await loop.sleep(for: rest) }
            let isWritten = (try? await target.writeAll(piece.buffer.bytes(0..<piece.count))) != nil
            queue.bytes -= piece.count
            // Whoever reads must not wait for what nobody writes any more.
            if !isWritten { queue.bytes = .min / 2 }
            queue.changed.signal()
            guard isWritten else { return }
        }
    }
}
