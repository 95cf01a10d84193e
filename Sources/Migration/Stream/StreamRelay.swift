public import IO

/// Carries QEMU's migration stream between two channels, both directions, each with its own end.
public enum StreamRelay {
    /// How much is read at once; what was read is encrypted and sent before more is read.
    private static let pieceSize = 256 << 10
    private static let pool = BufferPool(keep: 4 << 20)

    /// Copies both directions until both have ended.
    ///
    /// The end of one direction is passed on and the other goes on: the return path still carries the destination's
    /// verdict when the source has sent everything. Called on the loop of both channels.
    ///
    /// - Parameters:
    ///   - near: one channel; closed at the end.
    ///   - far: the other one; closed at the end.
    ///   - count: is told how many bytes went from `near` to `far`.
    ///   - countBack: is told how many bytes went from `far` to `near`.
    public static func run(
        _ near: any Channel,
        _ far: any Channel,
        count: @escaping @Sendable (Int) -> Void = { _ in },
        countBack: @escaping @Sendable (Int) -> Void = { _ in }
    ) async throws {
        defer {
            near.close()
            far.close()
        }
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask(executorPreference: near.loop) { try await copy(from: near, to: far, count: count) }
            group.addTask(executorPreference: near.loop) { try await copy(from: far, to: near, count: countBack) }
            do {
                try await group.next()
                try await group.next()
            } catch {
                // The other direction must not wait for a peer that will never hear of this.
                let reason = ChannelError(.closed, "The migration stream broke: \(error)")
                near.abort(reason)
                far.abort(reason)
                throw error
            }
        }
    }

    /// Copies one direction to its end, which is passed on. Called on the loop of both channels.
    static func copy(
        from source: any Channel,
        to target: any Channel,
        count: @Sendable (Int) -> Void
    ) async throws {
        let buffer = pool.buffer(pieceSize)
        while true {
            guard let read = try source.readNow(into: buffer.mutable(0..<pieceSize)) else {
                // Nothing more at the moment, so what was gathered must not wait.
                try await target.flushAll()
                try await source.waitReadable()
                continue
            }
            if read == 0 { break }
            try await target.writeAll(buffer.bytes(0..<read), flush: false)
            count(read)
        }
        try await target.finishWriting()
    }
}
