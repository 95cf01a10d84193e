/// A condition that tasks of one loop wait for; whoever changes the state calls `signal`.
public final class AsyncCondition: @unchecked Sendable {
    // Unchecked: confined to the loop.
    private var waiting: [UnsafeContinuation<Void, Never>] = []

    /// Makes a condition that nobody waits for.
    public init() {}

    /// Suspends until the next `signal`.
    public func wait() async { await withUnsafeContinuation { waiting.append($0) } }

    /// Resumes all who wait.
    public func signal() {
        if waiting.isEmpty { return }
        let woken = waiting
        waiting.removeAll(keepingCapacity: true)
        for continuation in woken { continuation.resume() }
    }
}
