public import IO

/// QEMU's migration stream where it leaves over several connections: it is cut into numbered pieces, each connection takes the next one when
/// it has sent the one before, and what comes back on the first one is QEMU's answer.
///
/// So a connection that is slow gets less to carry, and none waits for another here. It holds a piece for each connection and one more.
public final class LaneSender: @unchecked Sendable {
    // Unchecked: confined to `loop`.
    private struct Piece: @unchecked Sendable {
        // Unchecked: handed from who reads to who sends, and used by one of them at a time.
        let number: UInt64
        let count: Int
        let buffer: IOBuffer
    }

    private let near: any Channel
    private let loop: EventLoop
    private let lanes: [any Channel]
    private let compression: Compression
    private let lineRate: Double?
    private let count: @Sendable (Int, Int) -> Void
    private var waiting: [Piece] = []
    private var next: UInt64 = 0
    private var hasEnded = false
    private var failure: ChannelError?
    private let changed = AsyncCondition()
    private let taken = AsyncCondition()
    private static let pool = BufferPool(keep: 8 << 20)

    /// Makes a stream.
    ///
    /// - Parameters:
    ///   - near: where it comes from; closed at the end.
    ///   - lanes: the connections, at most `StreamPiece.mostLanes`; closed at the end. The first one has the loop of `near`, the others any.
    ///   - compression: whether pieces are compressed, each on its connection's loop; the other end has to know that.
    ///   - lineRate: what the line was measured to take, in bytes per second; nil when it was not.
    ///   - count: is told how many bytes of the stream were sent, and what they were on the line, from any loop.
    public init(
        from near: any Channel,
        over lanes: [any Channel],
        compression: Compression = .off,
        lineRate: Double? = nil,
        count: @escaping @Sendable (_ bytes: Int, _ onLine: Int) -> Void
    ) {
        self.compression = compression
        self.lineRate = lineRate
        self.near = near
        self.lanes = lanes
        self.count = count
        loop = near.loop
    }

    /// Carries both directions until both have ended. Called on the loop of `near`.
    ///
    /// - Throws: `ChannelError`, after everything was broken.
    public func run() async throws {
        defer {
            near.close()
            for lane in lanes {
                if lane.loop === loop { lane.close() } else { lane.loop.execute { lane.close() } }
            }
        }
        let first = lanes[0]
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask(executorPreference: loop) { try await self.read() }
            group.addTask(executorPreference: loop) { try await StreamRelay.copy(from: first, to: self.near) { _ in } }
            for lane in lanes { group.addTask(executorPreference: lane.loop) { try await self.send(over: lane) } }
            do {
                while try await group.next() != nil {}
            } catch {
                let reason = ChannelError(.closed, "The migration stream broke: \(error)")
                near.abort(reason)
                for lane in lanes { lane.abort(reason) }
                failure = reason
                changed.signal()
                taken.signal()
                throw error
            }
        }
    }

    /// Reads pieces; one is as large as what QEMU has ready.
    private func read() async throws {
        while true {
            let buffer = Self.pool.buffer(StreamPiece.largest)
            var filled = 0
            var isAtEnd = false
            while filled < StreamPiece.largest {
                guard let read = try near.readNow(into: buffer.mutable(filled..<StreamPiece.largest)) else {
                    if filled > 0 { break }
                    try await near.waitReadable()
                    continue
                }
                if read == 0 {
                    isAtEnd = true
                    break
                }
                filled += read
            }
            if filled > 0 {
                while waiting.count > 0, failure == nil { await taken.wait() }
                waiting.append(Piece(number: next, count: filled, buffer: buffer))
                next += 1
                changed.signal()
            }
            if let failure { throw failure }
            if isAtEnd {
                hasEnded = true
                return changed.signal()
            }
        }
    }

    private func take() async throws -> Piece? {
        while waiting.isEmpty {
            if let failure { throw failure }
            if hasEnded { return nil }
            await changed.wait()
        }
        defer { taken.signal() }
        return waiting.removeFirst()
    }

    private func send(over lane: any Channel) async throws {
        let header = IOBuffer(capacity: StreamPiece.headerSize)
        let frame = header.mutable(0..<StreamPiece.headerSize)
        var packer = PiecePacker(compression, line: lineRate.map { $0 / Double(lanes.count) })
        while let piece = try await loop.run({ try await self.take() }) {
            let packed = packer.pack(piece.buffer.bytes(0..<piece.count))
            StreamPiece(number: piece.number, count: packed.count, isCompressed: packed.isCompressed).write(into: frame)
            let began = ContinuousClock.now
            try await lane.writeAll(
                UnsafeRawBufferPointer(frame),
                packed.isCompressed ? packer.result.bytes(0..<packed.count) : piece.buffer.bytes(0..<piece.count)
            )
            packer.sent(packed.count, in: .now - began)
            count(piece.count, packed.count)
        }
        let total = try await loop.run { self.next }
        StreamPiece(number: total, count: 0).write(into: frame)
        try await lane.writeAll(UnsafeRawBufferPointer(frame))
        try await lane.finishWriting()
    }
}
