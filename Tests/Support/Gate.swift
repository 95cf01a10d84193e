internal import Glibc

/// A gate that threads wait at until it is opened.
public final class Gate: Sendable {
    private nonisolated(unsafe) let semaphore = UnsafeMutablePointer<sem_t>.allocate(capacity: 1)

    /// Makes a closed gate.
    public init() { sem_init(semaphore, 0, 0) }
    deinit { semaphore.deallocate() }

    /// Lets one waiter through.
    public func open() { sem_post(semaphore) }
    /// Blocks the thread until the gate is opened.
    public func wait() { while sem_wait(semaphore) != 0 {} }
}
