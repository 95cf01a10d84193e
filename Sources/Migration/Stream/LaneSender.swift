public import IO

/// QEMU's migration stream where it leaves over several connections: it is cut into numbered pieces, each connection takes the next one when
/// it has sent the one before, and what comes back on the first one is QEMU's answer.
///
/// So a connection that is slow gets less to carry, and none waits for another here. It holds a piece for each connection and one more.
/// Where the other end says on the second connection how many pieces it has passed on, no more is under way than `PieceWindow` allows.
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
    /// What may be under way; nil where the other end does not say what has arrived.
    private var window: PieceWindow?
    private let isWindowed: Bool
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
    ///   - seen: what others have just seen of the line: the bytes per second that arrived, and the round trip; nil when they have not.
    ///   - isAcknowledged: whether the other end says what it has passed on, on the second connection.
    ///   - count: is told how many bytes of the stream were sent, and what they were on the line, from any loop.
    public init(
        from near: any Channel,
        over lanes: [any Channel],
        compression: Compression = .off,
        lineRate: Double? = nil,
        seen: (rate: Double, roundTrip: Duration)? = nil,
        isAcknowledged: Bool = false,
        count: @escaping @Sendable (_ bytes: Int, _ onLine: Int) -> Void
    ) {
        self.compression = compression
        self.lineRate = lineRate
        self.near = near
        self.lanes = lanes
        self.count = count
        loop = near.loop
        isWindowed = isAcknowledged && lanes.count > 1
        let path = seen.map { PathEstimate(rate: $0.rate, roundTrip: $0.roundTrip) }
        window = isWindowed ? PieceWindow(path ?? PathEstimate()) : nil
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
            if window != nil {
                let second = lanes[1]
                group.addTask(executorPreference: second.loop) { try await self.readAcknowledgements(on: second) }
            }
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
                if waiting.count > 0 {
                    let began = ContinuousClock.now
                    while waiting.count > 0, failure == nil { await taken.wait() }
                    window?.waited(.now - began)
                }
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

    /// Waits for the next piece and for room for it.
    ///
    /// - Parameter shrunk: the one before of the same connection, when it is less on the line than it was: so much is what fills the line.
    /// - Returns: the piece, and the bytes per second that the line was seen to take; nil at the end.
    private func take(after shrunk: (number: UInt64, count: Int)?) async throws -> (Piece, Double?)? {
        if let shrunk {
            window?.shrink(shrunk.number, to: shrunk.count)
            changed.signal()
        }
        while true {
            if let failure { throw failure }
            if waiting.isEmpty, hasEnded { return nil }
            if let piece = waiting.first, window?.hasRoom(piece.count) ?? true { break }
            await changed.wait()
        }
        defer { taken.signal() }
        let piece = waiting.removeFirst()
        window?.send(piece.count)
        return (piece, window?.lineRate)
    }

    /// Learns what has arrived. Called on the loop of the connection.
    private func readAcknowledgements(on lane: any Channel) async throws {
        let number = IOBuffer(capacity: StreamPiece.acknowledgementSize)
        let bytes = number.mutable(0..<StreamPiece.acknowledgementSize)
        while try await lane.readFull(into: bytes) {
            let passed = StreamPiece.acknowledged(parsing: UnsafeRawBufferPointer(bytes))
            try await loop.run {
                try self.window?.pass(passed)
                self.changed.signal()
            }
        }
        try await loop.run {
            guard self.hasEnded, self.window?.passed == self.next else {
                throw ChannelError(
                    .truncated,
                    "\(lane.peerName) does not say any more what of the migration stream has arrived"
                )
            }
        }
    }

    private func send(over lane: any Channel) async throws {
        let header = IOBuffer(capacity: StreamPiece.headerSize)
        let frame = header.mutable(0..<StreamPiece.headerSize)
        var packer = PiecePacker(compression, line: lineRate.map { $0 / Double(lanes.count) })
        var shrunk: (number: UInt64, count: Int)?
        while let (piece, rate) = try await loop.run({ [shrunk] in try await self.take(after: shrunk) }) {
            // Connections that share a fast line would each believe it to be slow.
            if let rate {
                packer.measured(line: rate > CompressionChoice.fastLine ? .infinity : rate / Double(lanes.count))
            }
            let packed = packer.pack(piece.buffer.bytes(0..<piece.count))
            shrunk = packed.isCompressed ? (piece.number, packed.count) : nil
            StreamPiece(number: piece.number, count: packed.count, isCompressed: packed.isCompressed).write(into: frame)
            let began = ContinuousClock.now
            try await lane.writeAll(
                UnsafeRawBufferPointer(frame),
                packed.isCompressed ? packer.result.bytes(0..<packed.count) : piece.buffer.bytes(0..<piece.count)
            )
            // Where the window is waited for, the buffers of the connections take all that it lets through.
            if !isWindowed { packer.sent(packed.count, in: .now - began) }
            count(piece.count, packed.count)
        }
        let total = try await loop.run { self.next }
        StreamPiece(number: total, count: 0).write(into: frame)
        try await lane.writeAll(UnsafeRawBufferPointer(frame))
        try await lane.finishWriting()
    }
}
