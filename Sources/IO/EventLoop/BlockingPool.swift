internal import CLinux
internal import Glibc
internal import Synchronization

/// A few threads for calls that may block: disk I/O that misses the page cache, fsync, name resolution.
///
/// A loop never makes such a call itself, because every connection of the loop would wait with it.
public final class BlockingPool: Sendable {
    private struct Shared {
        var work: [(@Sendable () -> Void)?] = []
        var head = 0
        var idle = 0
        var threads = 0
    }

    private nonisolated(unsafe) let lock: UnsafeMutablePointer<pthread_mutex_t>
    private nonisolated(unsafe) let condition: UnsafeMutablePointer<pthread_cond_t>
    /// Behind a pointer: the lock guards it, and the optimiser, which knows nothing of locks, would hold one exclusive
    /// access to a property over the wait on the condition.
    private nonisolated(unsafe) let shared: UnsafeMutablePointer<Shared>
    private let width: Int
    private let niceness: Int32

    /// The pool that the process shares.
    public static let shared = BlockingPool(width: 8)

    /// A pool for long work in the background, such as the digests of whole disks, which must not keep others from the
    /// shared one.
    public static let background = BlockingPool(width: 4)

    /// A pool for decoding long texts of peers, which takes processor time.
    public static let decoding = BlockingPool(width: 4)

    /// A pool for names that peers want to have resolved, which may take many seconds for each of them.
    public static let names = BlockingPool(width: 16)

    /// A pool for what may as well be done later: its threads only get what processor time nobody else wants.
    public static let idle = BlockingPool(width: 2, niceness: 19)

    /// Makes a pool; its threads start as work arrives.
    ///
    /// - Parameters:
    ///   - width: how many threads at most.
    ///   - niceness: how far its threads go after others when processors are busy, 0 to 19 (setpriority(2)). Those that do must hold no lock
    ///     for long that others wait for, and start neither threads nor processes, which would inherit it.
    public init(width: Int, niceness: Int32 = 0) {
        self.width = width
        self.niceness = niceness
        lock = .allocate(capacity: 1)
        condition = .allocate(capacity: 1)
        shared = .allocate(capacity: 1)
        shared.initialize(to: Shared())
        pthread_mutex_init(lock, nil)
        pthread_cond_init(condition, nil)
    }

    /// Runs `body` on a thread of the pool and resumes the caller on its own executor.
    public func run<T: Sendable>(_ body: @escaping @Sendable () throws -> T) async throws -> T {
        try await withUnsafeThrowingContinuation { (continuation: UnsafeContinuation<T, any Error>) in
            submit { continuation.resume(with: Result(catching: body)) }
        }
    }

    /// Runs `body`, which cannot fail, on a thread of the pool.
    public func value<T: Sendable>(_ body: @escaping @Sendable () -> T) async -> T {
        await withUnsafeContinuation { (continuation: UnsafeContinuation<T, Never>) in
            submit { continuation.resume(returning: body()) }
        }
    }

    private func submit(_ work: @escaping @Sendable () -> Void) {
        pthread_mutex_lock(lock)
        shared.pointee.work.append(work)
        if shared.pointee.idle > 0 { pthread_cond_signal(condition) }
        // An idle thread that was woken a moment ago counts as idle until it runs.
        if shared.pointee.work.count - shared.pointee.head > shared.pointee.idle, shared.pointee.threads < width {
            shared.pointee.threads += 1
            startThread()
        }
        pthread_mutex_unlock(lock)
    }

    private func startThread() {
        var thread = pthread_t()
        let result = pthread_create(
            &thread,
            nil,
            { pointer in
                Unmanaged<BlockingPool>.fromOpaque(pointer!).takeRetainedValue().work()
                return nil
            },
            Unmanaged.passRetained(self).toOpaque()
        )
        precondition(result == 0, "the system refused a thread")
        pthread_detach(thread)
    }

    private func work() {
        xd_block_sigpipe()
        if niceness > 0 { xd_yield_to_others(niceness) }
        pthread_mutex_lock(lock)
        while true {
            if shared.pointee.head < shared.pointee.work.count {
                var item = shared.pointee.work[shared.pointee.head]
                // The queue may never be empty: what was taken from it must not be kept alive by it.
                shared.pointee.work[shared.pointee.head] = nil
                shared.pointee.head += 1
                if shared.pointee.head == shared.pointee.work.count {
                    shared.pointee.work.removeAll(keepingCapacity: true)
                    shared.pointee.head = 0
                } else if shared.pointee.head >= 256, shared.pointee.head > shared.pointee.work.count / 2 {
                    shared.pointee.work.removeFirst(shared.pointee.head)
                    shared.pointee.head = 0
                }
                pthread_mutex_unlock(lock)
                item?()
                item = nil
                pthread_mutex_lock(lock)
            } else {
                shared.pointee.idle += 1
                pthread_cond_wait(condition, lock)
                shared.pointee.idle -= 1
            }
        }
    }
}
