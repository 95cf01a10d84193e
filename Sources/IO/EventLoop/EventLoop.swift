internal import CLinux
internal import Glibc
internal import Synchronization

/// One thread around epoll that runs Swift tasks.
///
/// A task started with a loop as its executor preference runs on the loop's thread until it ends, its child tasks
/// included. Everything that belongs to a connection (its channel, its buffers, its timers) is confined to one loop,
/// so that the data path needs no lock and no hand-over between threads.
///
/// A loop is a `TaskExecutor` only: an object that is a `SerialExecutor` as well makes each call through it an order
/// of magnitude slower.
public final class EventLoop: TaskExecutor {
    private struct Shared {
        var jobs: [UnownedJob] = []
        var callbacks: [@Sendable () -> Void] = []
        var asleep = false
        var stopping = false
    }

    /// The name of the thread, at most 15 bytes are shown by the system.
    public let name: String
    private let shared = Guarded(Shared())
    private let epoll: Int32
    private let wake: Int32
    /// The state that only the loop's own thread touches.
    private nonisolated(unsafe) var timers = TimerHeap()
    private nonisolated(unsafe) var registrations: [Registration?] = []
    private nonisolated(unsafe) var nextGeneration: UInt32 = 1
    private let thread = Atomic<pthread_t>(0)
    private nonisolated(unsafe) var spinner = Spinner()

    /// Starts a loop on a thread of its own.
    ///
    /// - Parameter name: the thread's name.
    public init(name: String) {
        self.name = name
        epoll = xd_epoll_create()
        wake = xd_eventfd()
        precondition(epoll >= 0 && wake >= 0, "the process is out of file descriptors")
        precondition(xd_epoll_add_level(epoll, wake, UInt64.max) == 0, "epoll refused an event descriptor")
        let unmanaged = Unmanaged.passRetained(self)
        var thread = pthread_t()
        let result = pthread_create(
            &thread,
            nil,
            { pointer in
                let loop = Unmanaged<EventLoop>.fromOpaque(pointer!).takeRetainedValue()
                loop.run()
                return nil
            },
            unmanaged.toOpaque()
        )
        precondition(result == 0, "the system refused a thread")
        pthread_detach(thread)
    }

    deinit {
        Glibc.close(epoll)
        Glibc.close(wake)
    }

    /// Whether the caller runs on this loop's thread.
    public var isCurrent: Bool { thread.load(ordering: .relaxed) == pthread_self() }

    /// Queues a task's job; called by the Swift runtime.
    public func enqueue(_ job: consuming ExecutorJob) {
        let job = UnownedJob(job)
        let mustWake = shared.withLock { state in
            state.jobs.append(job)
            defer { state.asleep = false }
            return state.asleep
        }
        if mustWake { _ = xd_eventfd_signal(wake) }
    }

    /// Runs a closure on the loop's thread, after what is queued already.
    public func execute(_ callback: @escaping @Sendable () -> Void) {
        let mustWake = shared.withLock { state in
            state.callbacks.append(callback)
            defer { state.asleep = false }
            return state.asleep
        }
        if mustWake { _ = xd_eventfd_signal(wake) }
    }

    /// Runs `body` on this loop and returns what it returns.
    public func run<T: Sendable>(_ body: @escaping @Sendable () async throws -> T) async throws -> T {
        // A `nonisolated(nonsending)` body inside `withTaskExecutorPreference` would stay where the caller is; a task
        // of its own starts on the loop.
        let task = Task(executorPreference: self) { try await body() }
        return try await withTaskCancellationHandler {
            try await task.value
        } onCancel: {
            task.cancel()
        }
    }

    /// Ends the loop's thread once the queued work has run. Tasks that still wait on the loop never resume.
    public func stop() {
        let mustWake = shared.withLock { state in
            state.stopping = true
            defer { state.asleep = false }
            return state.asleep
        }
        if mustWake { _ = xd_eventfd_signal(wake) }
    }

    private func run() {
        thread.store(pthread_self(), ordering: .relaxed)
        xd_thread_name(String(name.prefix(15)))
        xd_block_sigpipe()
        var jobs: [UnownedJob] = []
        var callbacks: [@Sendable () -> Void] = []
        let events = UnsafeMutablePointer<xd_event>.allocate(capacity: 64)
        defer { events.deallocate() }
        let executor = asUnownedTaskExecutor()
        while true {
            let stopping = shared.withLock { state in
                swap(&jobs, &state.jobs)
                swap(&callbacks, &state.callbacks)
                return state.stopping && jobs.isEmpty && callbacks.isEmpty
            }
            if stopping { return }
            for callback in callbacks { callback() }
            callbacks.removeAll(keepingCapacity: true)
            for job in jobs { job.runSynchronously(on: executor) }
            jobs.removeAll(keepingCapacity: true)
            let timeout = timers.isEmpty ? -1 : fireTimers()
            let mayBlock = shared.withLock { state in
                state.asleep = state.jobs.isEmpty && state.callbacks.isEmpty && !state.stopping
                return state.asleep
            }
            var count: Int32 = 0
            if mayBlock, spinner.begin() {
                count = xd_epoll_spin(epoll, events, 64, Spinner.nanoseconds)
                spinner.end(success: count > 0)
            }
            if count == 0 { count = xd_epoll_wait(epoll, events, 64, mayBlock ? timeout : 0) }
            if mayBlock { shared.withLock { $0.asleep = false } }
            for index in 0..<Int(max(count, 0)) { handle(events[index]) }
        }
    }

    private func handle(_ event: xd_event) {
        if event.data == UInt64.max {
            _ = xd_eventfd_drain(wake)
            return
        }
        let fd = Int(event.data & 0xffff_ffff)
        let generation = UInt32(event.data >> 32)
        // A late event for a closed and reused descriptor carries the old generation.
        guard fd < registrations.count, let registration = registrations[fd], registration.generation == generation
        else { return }
        registration.fire(
            readable: event.flags & UInt32(XD_READABLE) != 0,
            writable: event.flags & UInt32(XD_WRITABLE) != 0,
            hangup: event.flags & UInt32(XD_HANGUP) != 0
        )
    }

    /// Says that the peer that was answered just now will probably ask again within microseconds: the loop then looks a few
    /// times before it sleeps, which saves the time that a processor takes to fall asleep and wake up. Called on the loop.
    public func expectMore() { spinner.isWanted = true }

    private func fireTimers() -> Int32 {
        let now = ContinuousClock.now
        while let due = timers.popDue(now) { due.fire() }
        guard let next = timers.nextDeadline else { return -1 }
        let (seconds, attoseconds) = (next - now).components
        let milliseconds = seconds * 1000 + attoseconds / 1_000_000_000_000_000
        return Int32(clamping: max(milliseconds + 1, 0))
    }

    /// Watches a descriptor until `deregister`. Called on the loop.
    func register(_ fd: Int32) throws -> Registration {
        precondition(isCurrent, "a descriptor is registered on the thread of its loop")
        let generation = nextGeneration
        nextGeneration &+= 1
        let registration = Registration(generation: generation)
        guard xd_epoll_add(epoll, fd, UInt64(generation) << 32 | UInt64(UInt32(bitPattern: fd))) == 0 else {
            throw ChannelError.system("watch descriptor \(fd)", errno)
        }
        while registrations.count <= Int(fd) { registrations.append(nil) }
        registrations[Int(fd)] = registration
        return registration
    }

    /// Ends the watch on a descriptor. Called on the loop, before the descriptor is closed.
    func deregister(_ fd: Int32) {
        guard Int(fd) < registrations.count else { return }
        registrations[Int(fd)] = nil
        _ = xd_epoll_remove(epoll, fd)
    }

    /// Runs `action` on the loop once `delay` has passed, unless the timer is cancelled first. Called on the loop.
    @discardableResult
    public func schedule(after delay: Duration, _ action: @escaping () -> Void) -> LoopTimer {
        precondition(isCurrent, "a timer is set on the thread of its loop")
        let timer = LoopTimer(deadline: .now + delay, action: action)
        timers.insert(timer)
        return timer
    }

    /// Suspends the task for `delay`, also when the task was cancelled: a loop that polls would spin otherwise. Called on
    /// the loop.
    public func sleep(for delay: Duration) async {
        await withUnsafeContinuation { continuation in
            schedule(after: delay) { continuation.resume() }
        }
    }
}

/// Decides whether a loop looks a few times before it sleeps. Where that fails a few times in a row, it is tried seldom.
private struct Spinner {
    static let nanoseconds: Int64 = 50_000
    var isWanted = false
    private var failures = 0
    private var skipped = 0

    mutating func begin() -> Bool {
        guard isWanted else { return false }
        isWanted = false
        if failures < 4 { return true }
        skipped += 1
        if skipped < 64 { return false }
        skipped = 0
        return true
    }

    mutating func end(success: Bool) { failures = success ? 0 : min(failures + 1, 4) }
}

/// The readiness of one descriptor, and who waits for it. Touched only on the loop's thread.
final class Registration {
    let generation: UInt32
    private var readable = false
    private var writable = false
    private var failed = false
    /// Whether everything that was there has been read, and no event has come since.
    private(set) var isDrained = false
    private var hungUp = false
    private var reader: UnsafeContinuation<Void, Never>?
    private var writer: UnsafeContinuation<Void, Never>?

    init(generation: UInt32) { self.generation = generation }

    /// The last read brought less than was asked for, so the next one would bring nothing (epoll(7)). After the peer has hung
    /// up it would bring the end, which no further event announces.
    func noteShortRead() { isDrained = !hungUp }

    func fire(readable: Bool, writable: Bool, hangup: Bool) {
        if hangup { hungUp = true }
        if readable {
            isDrained = false
            if let waiting = reader.take() { waiting.resume() } else { self.readable = true }
        }
        if writable {
            if let waiting = writer.take() { waiting.resume() } else { self.writable = true }
        }
    }

    /// Wakes both waiters for good: later waits return at once.
    func fail() {
        failed = true
        reader.take()?.resume()
        writer.take()?.resume()
    }

    func waitReadable() async {
        if failed { return }
        if readable {
            readable = false
            return
        }
        precondition(reader == nil, "one task at a time reads from a channel")
        await withUnsafeContinuation { reader = $0 }
    }

    func waitWritable() async {
        if failed { return }
        if writable {
            writable = false
            return
        }
        precondition(writer == nil, "one task at a time writes to a channel")
        await withUnsafeContinuation { writer = $0 }
    }
}

extension Optional where Wrapped: ~Copyable {
    /// Returns the value and leaves nil behind.
    mutating func take() -> Wrapped? {
        let value = consume self
        self = nil
        return value
    }
}
