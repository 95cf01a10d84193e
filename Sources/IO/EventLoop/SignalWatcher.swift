internal import Glibc

/// Turns signals into calls on a thread of their own, where everything is allowed.
public enum SignalWatcher {
    /// Blocks the signals for the process and calls `handler` for each that comes.
    ///
    /// Called once, before any other thread is started: threads inherit the mask.
    public static func start(_ signals: [Int32], _ handler: @escaping @Sendable (Int32) -> Void) {
        var set = sigset_t()
        sigemptyset(&set)
        for number in signals { sigaddset(&set, number) }
        pthread_sigmask(SIG_BLOCK, &set, nil)
        signal(SIGPIPE, SIG_IGN)
        let context = Unmanaged.passRetained(Context(set, handler))
        var thread = pthread_t()
        let result = pthread_create(
            &thread,
            nil,
            { pointer in
                let context = Unmanaged<Context>.fromOpaque(pointer!).takeRetainedValue()
                while true {
                    var number: Int32 = 0
                    if sigwait(&context.set, &number) == 0 { context.handler(number) }
                }
            },
            context.toOpaque()
        )
        precondition(result == 0, "the system refused a thread")
        pthread_detach(thread)
    }

    private final class Context {
        var set: sigset_t
        let handler: @Sendable (Int32) -> Void

        init(_ set: sigset_t, _ handler: @escaping @Sendable (Int32) -> Void) {
            self.set = set
            self.handler = handler
        }
    }
}
