/// A counting semaphore for each key: of one key so many may hold a permit at once, and the others of that key wait, first come,
/// first served. What one key holds keeps no other key waiting.
public final class KeyedSemaphore: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// A place in the queue of a key, and once `wait` has returned the right to go on.
    public final class Permit: @unchecked Sendable {
        // Unchecked: confined to the loop.
        fileprivate enum Phase {
            case queued
            case waiting(UnsafeContinuation<Void, any Error>)
            case held
            case ended
        }
        fileprivate var phase = Phase.queued
        fileprivate let key: String
        private let semaphore: KeyedSemaphore

        fileprivate init(_ key: String, of semaphore: KeyedSemaphore) {
            self.key = key
            self.semaphore = semaphore
        }

        /// Returns when it is this permit's turn. Called once.
        ///
        /// - Throws: `ChannelError` with `Code.closed` when `end` comes first.
        public func wait() async throws {
            try await withUnsafeThrowingContinuation { continuation in
                switch phase {
                case .held: continuation.resume()
                case .queued: phase = .waiting(continuation)
                case .waiting, .ended: continuation.resume(throwing: Permit.abandoned)
                }
            }
        }

        fileprivate func grant() {
            if case .waiting(let continuation) = phase { continuation.resume() }
            phase = .held
        }

        /// Gives the permit back, or leaves the queue: whoever waits for it is told. May be called again.
        public func end() {
            let former = phase
            phase = .ended
            switch former {
            case .ended: return
            case .held: semaphore.giveBack(self)
            case .queued: semaphore.leave(self)
            case .waiting(let continuation):
                semaphore.leave(self)
                continuation.resume(throwing: Permit.abandoned)
            }
        }

        fileprivate var hasEnded: Bool { if case .ended = phase { true } else { false } }

        /// Leaves the queue; nothing happens once it was this permit's turn.
        public func leave() {
            if case .held = phase { return }
            end()
        }

        private static let abandoned = ChannelError(.closed, "Nobody waits for this any more")
    }

    /// What is held of a key, and who waits. Each step takes the same time, however long the queue is.
    private struct Line {
        var held = 0
        var waiting = 0
        /// Those that wait, from `first` on, and among them some that have left.
        private var queue: [Permit] = []
        private var first = 0

        mutating func append(_ permit: Permit) {
            queue.append(permit)
            waiting += 1
        }

        mutating func leave() {
            waiting -= 1
            // Those that have left are cleared away once they are the most.
            if queue.count > 2 * waiting + 16 { (queue, first) = (queue[first...].filter { !$0.hasEnded }, 0) }
        }

        mutating func next() -> Permit? {
            while first < queue.count {
                let permit = queue[first]
                first += 1
                if permit.hasEnded { continue }
                waiting -= 1
                if first > 2 * waiting + 16 { (queue, first) = (Array(queue[first...]), 0) }
                return permit
            }
            (queue, first) = ([], 0)
            return nil
        }
    }
    private let limit: Int
    private var lines: [String: Line] = [:]

    /// Makes a semaphore.
    ///
    /// - Parameter limit: how many permits of one key are held at once; at least 1.
    public init(limit: Int) {
        precondition(limit > 0, "a semaphore without permits would never let anybody go on")
        self.limit = limit
    }

    /// How many permits of a key are held.
    public func held(_ key: String) -> Int { lines[key]?.held ?? 0 }

    /// How many permits of a key wait for their turn.
    public func waiting(_ key: String) -> Int { lines[key]?.waiting ?? 0 }

    /// Takes a place in the queue of a key. Who asks calls `end`, whatever happens.
    public func request(_ key: String) -> Permit {
        let permit = Permit(key, of: self)
        if held(key) < limit {
            lines[key, default: Line()].held += 1
            permit.phase = .held
        } else {
            lines[key, default: Line()].append(permit)
        }
        return permit
    }

    private func giveBack(_ permit: Permit) {
        if let next = lines[permit.key]?.next() { return next.grant() }
        lines[permit.key]?.held -= 1
        if held(permit.key) == 0 { lines[permit.key] = nil }
    }

    private func leave(_ permit: Permit) { lines[permit.key]?.leave() }
}
