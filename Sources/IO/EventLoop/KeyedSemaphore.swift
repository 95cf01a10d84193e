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
            switch phase {
            case .ended: return
            case .held: semaphore.giveBack(self)
            case .queued: semaphore.leave(self)
            case .waiting(let continuation):
                semaphore.leave(self)
                continuation.resume(throwing: Permit.abandoned)
            }
            phase = .ended
        }

        /// Leaves the queue; nothing happens once it was this permit's turn.
        public func leave() {
            if case .held = phase { return }
            end()
        }

        private static let abandoned = ChannelError(.closed, "Nobody waits for this any more")
    }

    private struct Line {
        var held = 0
        var queue: [Permit] = []
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
    public func waiting(_ key: String) -> Int { lines[key]?.queue.count ?? 0 }

    /// Takes a place in the queue of a key. Who asks calls `end`, whatever happens.
    public func request(_ key: String) -> Permit {
        let permit = Permit(key, of: self)
        var line = lines[key] ?? Line()
        if line.held < limit {
            line.held += 1
            permit.phase = .held
        } else {
            line.queue.append(permit)
        }
        lines[key] = line
        return permit
    }

    private func giveBack(_ permit: Permit) {
        guard var line = lines[permit.key] else { return }
        if line.queue.isEmpty {
            line.held -= 1
            lines[permit.key] = line.held == 0 ? nil : line
        } else {
            let next = line.queue.removeFirst()
            lines[permit.key] = line
            next.grant()
        }
    }

    private func leave(_ permit: Permit) {
        lines[permit.key]?.queue.removeAll { $0 === permit }
    }
}
