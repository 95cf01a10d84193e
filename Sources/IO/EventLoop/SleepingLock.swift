internal import Glibc

/// A lock whose holder is waited for asleep from the first moment on.
///
/// `Mutex` asks the kernel for a lock that lends its priority, which has a waiter spin as long as the holder runs: right for what takes a
/// microsecond, and wasted where the holder copies a megabyte and the waiter's core has other work.
public final class SleepingLock: @unchecked Sendable {
    // Unchecked: a lock is made to be used by several threads.
    private let mutex: UnsafeMutablePointer<pthread_mutex_t>

    /// Makes a lock that nobody has.
    public init() {
        mutex = .allocate(capacity: 1)
        let code = pthread_mutex_init(mutex, nil)
        precondition(code == 0, "A mutex of this process alone needs nothing that could be missing")
    }

    deinit {
        pthread_mutex_destroy(mutex)
        mutex.deallocate()
    }

    /// Runs `body` alone.
    public func withLock<Result, Failure: Error>(_ body: () throws(Failure) -> Result) throws(Failure) -> Result {
        pthread_mutex_lock(mutex)
        defer { pthread_mutex_unlock(mutex) }
        return try body()
    }

    /// Runs `body` alone, if nobody else has the lock now.
    ///
    /// - Returns: nil when somebody has it.
    public func withLockIfAvailable<Result, Failure: Error>(
        _ body: () throws(Failure) -> Result
    ) throws(Failure) -> Result? {
        guard pthread_mutex_trylock(mutex) == 0 else { return nil }
        defer { pthread_mutex_unlock(mutex) }
        return try body()
    }
}
