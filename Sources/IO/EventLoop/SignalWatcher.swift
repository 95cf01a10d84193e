internal import CLinux
internal import Glibc

/// Turns signals into calls on a thread of their own, where everything is allowed.
public enum SignalWatcher {
    /// Calls `handler` for each of the signals that comes, from now on. Called once in a process.
    ///
    /// A signal may arrive on any thread, so a handler passes its number through a pipe to the watcher's thread.
    /// SIGPIPE is ignored: writing to who has gone is an error of the write.
    public static func start(_ signals: [Int32], _ handler: @escaping @Sendable (Int32) -> Void) {
        let descriptor = xd_signal_pipe(signals, Int32(signals.count))
        precondition(descriptor >= 0, "the process is out of file descriptors")
        let context = Unmanaged.passRetained(Context(descriptor, handler))
        var thread = pthread_t()
        let result = pthread_create(
            &thread,
            nil,
            { pointer in
                let context = Unmanaged<Context>.fromOpaque(pointer!).takeRetainedValue()
                var number: UInt8 = 0
                while true {
                    let count = read(context.descriptor, &number, 1)
                    if count == 1 { context.handler(Int32(number)) } else if count == 0 || errno != EINTR { return nil }
                }
            },
            context.toOpaque()
        )
        precondition(result == 0, "the system refused a thread")
        pthread_detach(thread)
    }

    private final class Context {
        let descriptor: Int32
        let handler: @Sendable (Int32) -> Void

        init(_ descriptor: Int32, _ handler: @escaping @Sendable (Int32) -> Void) {
            self.descriptor = descriptor
            self.handler = handler
        }
    }
}
