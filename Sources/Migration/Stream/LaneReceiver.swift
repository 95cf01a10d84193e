public import IO

/// QEMU's migration stream where it comes in over several connections: their pieces, decrypted on a loop for each of them, are passed on in
/// order, and what QEMU answers goes back over the first one.
///
/// It holds a piece for each connection, `StreamPiece.largest` bytes, whatever the source sends.
public final class LaneReceiver: @unchecked Sendable {
    // Unchecked: confined to `loop`.
    private let near: any Channel
    private let loop: EventLoop
    /// Which sending of the memory it carries.
    public let attempt: Int
    private let acknowledges: Bool
    private let count: @Sendable (Int) -> Void
    private var order = StreamOrder()
    /// Whether QEMU was told that nothing more comes.
    private var isFinished = false
    /// Pieces were passed on, or the stream has failed.
    private let advanced = AsyncCondition()
    private var turns: [UInt64: UnsafeContinuation<Void, Never>] = [:]
    private var channels: [any Channel] = []
    private var failure: ChannelError?
    private static let pool = BufferPool(keep: 4 << 20)

    /// Makes a stream.
    ///
    /// - Parameters:
    ///   - near: where it goes; closed at the end. Its loop is the one that puts the pieces in order.
    ///   - attempt: which sending of the memory it is.
    ///   - acknowledges: whether the source wants to know what was passed on: it is told on the second connection.
    ///   - count: is told how many bytes were passed on.
    public init(
        to near: any Channel,
        attempt: Int,
        acknowledges: Bool = false,
        count: @escaping @Sendable (Int) -> Void = { _ in }
    ) {
        (self.near, self.count) = (near, count)
        self.acknowledges = acknowledges
        self.attempt = attempt
        loop = near.loop
    }

    /// A connection is about to bring pieces; called before it is told that it may. From any loop.
    ///
    /// - Throws: as `StreamOrder.join`, and why the stream has failed.
    public func join() async throws {
        try await loop.run {
            if let failure = self.failure { throw failure }
            try self.order.join()
        }
    }

    /// Passes on what a connection that has joined brings, to its end. Called on the connection's loop.
    ///
    /// - Parameters:
    ///   - channel: the connection. The caller closes it.
    ///   - number: which one it is. The first one, 0, carries the answers and lasts as long as they do, and its loop is that of `near`.
    /// - Throws: why the stream has failed, on whichever connection.
    public func carry(_ channel: any Channel, number: Int) async throws {
        try await loop.run {
            if let failure = self.failure { throw failure }
            self.channels.append(channel)
        }
        do {
            switch number {
            case 0:
                defer { near.close() }
                try await both(channel) { try await StreamRelay.copy(from: self.near, to: channel) { _ in } }
                // QEMU may have said its last before the other connections have brought their ends.
                while !isFinished {
                    if let failure { throw failure }
                    await advanced.wait()
                }
            case 1 where acknowledges: try await both(channel) { try await self.acknowledge(on: channel) }
            default: try await receive(channel)
            }
        } catch {
            await fail(error)
            throw error
        }
    }

    /// Receives, and sends something else meanwhile.
    private func both(_ channel: any Channel, _ answer: @escaping @Sendable () async throws -> Void) async throws {
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask(executorPreference: channel.loop) { try await self.receive(channel) }
            group.addTask(executorPreference: channel.loop) { try await answer() }
            do {
                try await group.next()
                try await group.next()
            } catch {
                await self.fail(error)
                throw error
            }
        }
    }

    /// Tells how many pieces were passed on, until all of them were.
    private func acknowledge(on channel: any Channel) async throws {
        let number = IOBuffer(capacity: StreamPiece.acknowledgementSize)
        let bytes = number.mutable(0..<StreamPiece.acknowledgementSize)
        var told: UInt64 = 0
        while true {
            let (passed, isOver) = try await loop.run { [told] in try await self.progress(beyond: told) }
            if passed > told {
                told = passed
                StreamPiece.acknowledge(passed, into: bytes)
                try await channel.writeAll(UnsafeRawBufferPointer(bytes))
            }
            if isOver { return try await channel.finishWriting() }
        }
    }

    private func progress(beyond told: UInt64) async throws -> (UInt64, Bool) {
        while order.next <= told, !order.isOver {
            if let failure { throw failure }
            await advanced.wait()
        }
        if let failure { throw failure }
        return (order.next, order.isOver)
    }

    /// Breaks the stream. From any thread.
    public func abort(_ reason: String) { loop.execute { self.end(ChannelError(.closed, reason)) } }

    private func receive(_ channel: any Channel) async throws {
        let header = IOBuffer(capacity: StreamPiece.headerSize)
        let buffer = Self.pool.buffer(StreamPiece.largest)
        var unpacker: PieceUnpacker?
        while true {
            guard try await channel.readFull(into: header.mutable(0..<StreamPiece.headerSize)) else {
                throw ChannelError(
                    .truncated,
                    "\(channel.peerName) ended a connection of the migration stream without its end"
                )
            }
            let piece = try StreamPiece(parsing: header.bytes(0..<StreamPiece.headerSize))
            if piece.count == 0 {
                try await loop.run { try await self.ended(piece.number) }
                // What the socket still has when it is closed would cost the peer what is on its way to it.
                guard try await channel.readSome(into: header.mutable(0..<1)) == 0 else {
                    throw ChannelError(.protocolViolation, "The migration stream goes on after its end")
                }
                return
            }
            guard try await channel.readFull(into: buffer.mutable(0..<piece.count)) else {
                throw ChannelError(
                    .truncated,
                    "\(channel.peerName) ended the migration stream in the middle of a piece"
                )
            }
            guard piece.isCompressed else {
                try await loop.run { try await self.pass(piece.number, buffer, piece.count) }
                continue
            }
            let used = try unpacker ?? PieceUnpacker()
            unpacker = used
            let count = try used.unpack(buffer.bytes(0..<piece.count))
            try await loop.run { try await self.pass(piece.number, used.result, count) }
        }
    }

    private func pass(_ number: UInt64, _ buffer: IOBuffer, _ count: Int) async throws {
        if let failure { throw failure }
        if try !order.arrived(number) {
            await withUnsafeContinuation { turns[number] = $0 }
            if let failure { throw failure }
        }
        try await near.writeAll(buffer.bytes(0..<count))
        self.count(count)
        if let due = try order.passed() { turns.removeValue(forKey: due)?.resume() }
        advanced.signal()
        try await finish()
    }

    private func ended(_ count: UInt64) async throws {
        if let failure { throw failure }
        try order.ended(count)
        advanced.signal()
        try await finish()
    }

    private func finish() async throws {
        guard order.isOver else { return }
        try await near.finishWriting()
        isFinished = true
        advanced.signal()
    }

    private func fail(_ error: any Error) async {
        try? await loop.run { self.end(ChannelError(.closed, "The migration stream broke: \(error)")) }
    }

    private func end(_ reason: ChannelError) {
        guard failure == nil else { return }
        failure = reason
        near.abort(reason)
        for channel in channels { channel.abort(reason) }
        for turn in turns.values { turn.resume() }
        turns = [:]
        advanced.signal()
    }
}
