internal import CLinux
public import Synchronization

/// A value behind a lock: `Mutex`, which ThreadSanitizer can see.
///
/// The standard library's lock is not instrumented, so that every value behind it looks like a race. A build with `-D TSAN` tells
/// the sanitizer who holds what; in other builds this is `Mutex` and nothing else.
public struct Guarded<Value>: ~Copyable, @unchecked Sendable {
    // Unchecked: the value is reached through the lock only.
    @usableFromInline let mutex: Mutex<Value>
    #if TSAN
        private final class Token: Sendable {}
        private let token = Token()
    #endif

    /// Puts a value behind a lock.
    @inlinable
    public init(_ value: sending Value) { mutex = Mutex(value) }

    /// Runs `body` with the value, alone.
    @inlinable
    public borrowing func withLock<Result: ~Copyable, Failure: Error>(
        _ body: (inout sending Value) throws(Failure) -> sending Result
    ) throws(Failure) -> sending Result {
        #if TSAN
            return try mutex.withLock { value throws(Failure) in
                acquired()
                defer { releasing() }
                return try body(&value)
            }
        #else
            return try mutex.withLock(body)
        #endif
    }

    /// Runs `body` with the value if nobody else has it now.
    @inlinable
    public borrowing func withLockIfAvailable<Result: ~Copyable, Failure: Error>(
        _ body: (inout sending Value) throws(Failure) -> sending Result
    ) throws(Failure) -> sending Result? {
        #if TSAN
            return try mutex.withLockIfAvailable { value throws(Failure) in
                acquired()
                defer { releasing() }
                return try body(&value)
            }
        #else
            return try mutex.withLockIfAvailable(body)
        #endif
    }

    #if TSAN
        @usableFromInline borrowing func acquired() { xd_tsan_acquire(Unmanaged.passUnretained(token).toOpaque()) }
        @usableFromInline borrowing func releasing() { xd_tsan_release(Unmanaged.passUnretained(token).toOpaque()) }
    #endif
}
