internal import IO
internal import Migration

/// The table of what an image has already, while the source may want it: other readings of the image wait for it.
///
/// Confined to the control loop.
final class SeedServing: @unchecked Sendable {
    // Unchecked: confined to the agent's control loop.

    /// Words of 64 chunks that are read, sent and forgotten at once: 32 MiB.
    static let wordsAtOnce = 8

    /// Whether the table is still to be made, or on its way: its readings come before others.
    private(set) var isDue = true
    private var connection: MessageConnection?
    private var isRunning = false
    private var turn: KeyedSemaphore.Permit?
    private let ended = AsyncCondition()

    /// Begins to tell the table on a connection.
    ///
    /// - Throws: `ChannelError` when it is told already.
    func begin(_ connection: MessageConnection) throws {
        guard !isRunning else { throw ChannelError(.protocolViolation, "The table of this seed is on its way already") }
        isRunning = true
        self.connection = connection
    }

    /// Waits until the source may have one more piece read: its tables have their turns, and others wait for none of them.
    ///
    /// - Throws: `ChannelError` with `Code.closed` when the table is not wanted any more.
    func awaitTurn(_ turns: KeyedSemaphore, _ identity: String) async throws {
        let turn = turns.request(identity)
        self.turn = turn
        try await turn.wait()
    }

    /// A piece was read.
    func endTurn() {
        turn?.end()
        turn = nil
    }

    /// It was told, or nobody listens any more.
    func end() {
        endTurn()
        isRunning = false
        isDue = false
        connection = nil
        ended.signal()
    }

    /// Nobody waits for the table any more: lets what is under way end.
    func stop() async {
        isDue = false
        turn?.leave()
        connection?.channel.abort(ChannelError(.closed, "The table of the seed is not wanted any more"))
        while isRunning { await ended.wait() }
    }
}
