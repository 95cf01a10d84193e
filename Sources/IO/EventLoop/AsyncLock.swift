/// First come, first served exclusion between tasks of one loop. Taking a free lock does not suspend.
public final class AsyncLock: @unchecked Sendable {
    // Unchecked: confined to the loop.
    private var held = false
    private var waiting: [UnsafeContinuation<Void, Never>] = []
    private var head = 0

    /// Makes a free lock.
    public init() {}

    /// Takes the lock, after those who wait already.
    public func acquire() async {
        if !held {
            held = true
            return
        }
        await withUnsafeContinuation { waiting.append($0) }
    }

    /// Hands the lock to the next who waits.
    public func release() {
        if head < waiting.count {
            let next = waiting[head]
            head += 1
            if head == waiting.count {
                waiting.removeAll(keepingCapacity: true)
                head = 0
            } else if head >= 256, head > waiting.count / 2 {
                waiting.removeFirst(head)
                head = 0
            }
            next.resume()
        } else {
            held = false
        }
    }
}
