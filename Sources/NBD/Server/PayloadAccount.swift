internal import IO
internal import Synchronization

/// How many bytes of payload the requests of one peer hold together, over all its connections.
///
/// What exceeds the limit waits until the peer's own requests are done; nobody else waits. A request that is longer than the limit is
/// let in alone.
final class PayloadAccount: Sendable {
    private let limit: Int
    private let held = Atomic<Int>(0)
    /// Those who wait, in the order in which they came.
    private let waiting = Guarded<[(count: Int, continuation: UnsafeContinuation<Void, Never>)]>([])
    /// How many wait: nobody looks for them when there are none.
    private let waiters = Atomic<Int>(0)

    init(limit: Int) { self.limit = limit }

    /// Bytes that are held.
    var count: Int { held.load(ordering: .relaxed) }

    /// Takes bytes; false when there is no room, or others wait for it.
    func tryTake(_ count: Int) -> Bool {
        waiters.load(ordering: .sequentiallyConsistent) == 0 && fits(count)
    }

    private func fits(_ count: Int) -> Bool {
        var known = held.load(ordering: .sequentiallyConsistent)
        while known == 0 || known + count <= limit {
            let (isDone, seen) = held.compareExchange(
                expected: known,
                desired: known + count,
                ordering: .sequentiallyConsistent
            )
            if isDone { return true }
            known = seen
        }
        return false
    }

    /// Takes bytes as soon as there is room.
    func take(_ count: Int) async {
        if tryTake(count) { return }
        await withUnsafeContinuation { continuation in
            waiters.wrappingAdd(1, ordering: .sequentiallyConsistent)
            waiting.withLock { $0.append((count, continuation)) }
            // What was given back meanwhile has found nobody who waits.
            serve()
        }
    }

    /// Gives bytes back.
    func give(_ count: Int) {
        held.wrappingSubtract(count, ordering: .sequentiallyConsistent)
        if waiters.load(ordering: .sequentiallyConsistent) > 0 { serve() }
    }

    private func serve() {
        let ready = waiting.withLock { waiting in
            let served = waiting.firstIndex { !fits($0.count) } ?? waiting.endIndex
            defer { waiting.removeSubrange(..<served) }
            return Array(waiting[..<served])
        }
        guard !ready.isEmpty else { return }
        waiters.wrappingSubtract(ready.count, ordering: .sequentiallyConsistent)
        for one in ready { one.continuation.resume() }
    }
}
