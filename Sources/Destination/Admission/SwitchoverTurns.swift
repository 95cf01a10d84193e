internal import IO
internal import Migration

/// Whose turn it is to switch over to this host: one guest at a time, in the order in which they were asked for.
///
/// A turn that lasts too long goes to whoever waits: what is at stake are pauses, and no source can keep the others waiting.
final class SwitchoverTurns: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// A place in the queue, and after `wait` the turn.
    final class Turn: @unchecked Sendable {
        // Unchecked: confined to the loop.
        fileprivate let permit: KeyedSemaphore.Permit
        fileprivate let source: String
        fileprivate var timer: LoopTimer?
        fileprivate var isOver = false
        private let turns: SwitchoverTurns

        fileprivate init(_ permit: KeyedSemaphore.Permit, _ source: String, _ turns: SwitchoverTurns) {
            (self.permit, self.source, self.turns) = (permit, source, turns)
        }

        /// Returns when it is this guest's turn. Called once.
        ///
        /// - Parameter lapsed: is told when the turn is taken back.
        /// - Throws: `ChannelError` with `Code.closed` when `end` comes first.
        func wait(lapsed: @escaping () -> Void) async throws {
            try await permit.wait()
            if !isOver { turns.watch(self, lapsed) }
        }

        /// Gives the turn, or the place in the queue, back. May be called again.
        func end() { turns.end(self) }
    }

    private static let key = ""
    private let semaphore = KeyedSemaphore(limit: 1)
    private let loop: EventLoop
    private let longest: Duration
    /// How many turns each identity has and waits for.
    private var counts: [String: Int] = [:]

    /// Makes turns.
    ///
    /// - Parameters:
    ///   - loop: where they live.
    ///   - longest: how long a turn lasts while others wait.
    init(on loop: EventLoop, longest: Duration = PeerLimits.turn) {
        self.loop = loop
        self.longest = longest
    }

    /// How many wait.
    var waiting: Int { semaphore.waiting(Self.key) }

    /// Takes a place in the queue. Who asks calls `end`, whatever happens.
    ///
    /// - Throws: `MigrationError` that names the limit.
    func request(_ source: String) throws -> Turn {
        guard counts[source, default: 0] < PeerLimits.turns else {
            throw MigrationError(
                .refused,
                "The limit of \(PeerLimits.turns) guests of one source that have or wait for their switchover is reached"
            )
        }
        guard waiting < PeerLimits.waitingTurns else {
            throw MigrationError(
                .refused,
                "The limit of \(PeerLimits.waitingTurns) guests that wait for their switchover on this host is reached"
            )
        }
        counts[source, default: 0] += 1
        return Turn(semaphore.request(Self.key), source, self)
    }

    private func watch(_ turn: Turn, _ lapsed: @escaping () -> Void) {
        turn.timer = loop.schedule(after: longest) {
            guard !turn.isOver else { return }
            guard self.waiting > 0 else { return self.watch(turn, lapsed) }
            self.end(turn)
            lapsed()
        }
    }

    private func end(_ turn: Turn) {
        guard !turn.isOver else { return }
        turn.isOver = true
        turn.timer?.cancel()
        let rest = counts[turn.source, default: 1] - 1
        counts[turn.source] = rest == 0 ? nil : rest
        turn.permit.end()
    }
}
