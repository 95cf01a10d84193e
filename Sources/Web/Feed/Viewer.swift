internal import IO

/// A browser that looks: what the feed says goes out as fast as it takes it, and no faster. Confined to its loop.
final class Viewer: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// Which guests it may know of.
    let audience: Audience
    /// Bytes of a message.
    private static let frameSize = 64 << 10
    /// Whom it counts for.
    let visitor: String
    /// Whether it still has the right to look.
    let mayStay: () -> Bool
    private let channel: WebSocketChannel
    private let silence: Duration
    private var queue = ViewerQueue()
    private let wake = AsyncCondition()
    private var isOver = false

    init(
        _ channel: WebSocketChannel,
        _ audience: Audience,
        visitor: String,
        silence: Duration = WebLimits.silence,
        mayStay: @escaping () -> Bool
    ) {
        self.silence = silence
        self.channel = channel
        self.audience = audience
        self.visitor = visitor
        self.mayStay = mayStay
    }

    func put(_ name: Sections.Name, _ section: Payload) { queue.put(name, section) }
    func add(_ event: Payload) { queue.add(event) }
    /// Sends what was put.
    func send() { if !queue.isEmpty { wake.signal() } }

    /// Ends it.
    func end(_ reason: String) {
        guard !isOver else { return }
        isOver = true
        channel.abort(ChannelError(.closed, reason))
        wake.signal()
    }

    /// Serves until the browser goes, is too slow, or loses its right.
    func serve() async {
        let loop = channel.loop
        let reader = Task(executorPreference: loop) { await self.read() }
        await write()
        isOver = true
        channel.abort(ChannelError(.closed, "The viewer is served no more"))
        await reader.value
        channel.close()
    }

    /// Nothing that a viewer says means anything; its end does.
    private func read() async {
        let buffer = IOBuffer(capacity: 4096)
        while !isOver {
            guard let count = try? await channel.readSome(into: buffer.mutable(0..<4096)), count > 0 else { break }
        }
        isOver = true
        wake.signal()
    }

    private func write() async {
        let timer = PingTimer(channel.loop) { [weak self] in self?.wake.signal() }
        defer { timer.end() }
        do {
            while !isOver {
                if timer.takeDue() {
                    try await bounded { try await self.channel.ping() }
                }
                let pieces = queue.take()
                if pieces.isEmpty {
                    if !isOver { await wake.wait() }
                    continue
                }
                for piece in pieces { try await write(piece) }
            }
        } catch {}
    }

    /// Little at a time, so that little of it is held in the layers below for a viewer that is slow.
    private func write(_ payload: Payload) async throws {
        var done = 0
        while done < payload.count, !isOver {
            let end = min(done + Self.frameSize, payload.count)
            try await bounded { try await self.channel.writeAll(payload.buffer.bytes(done..<end)) }
            done = end
        }
    }

    /// A viewer that takes nothing for so long is gone, or too slow.
    private func bounded(_ body: () async throws -> Void) async throws {
        try await channel.withDeadline(silence, for: "Sending to a viewer", body)
    }
}
