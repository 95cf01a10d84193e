internal import CLinux
internal import Glibc
public import IO

/// A process that ends this one when it stands still.
///
/// QEMU waits for the replies of a drained export to be read, so that a reader on the same host that is suspended or stuck
/// would hold up the guest. The kernel closes the connections of a reader that has ended.
public final class Heartbeat: Sendable {
    private let process: EmulatorProcess
    private let pipe: Int32
    private let task: Task<Void, Never>

    /// How long this process may stand still, in seconds.
    public static let patience = 10

    /// Starts it.
    ///
    /// - Parameters:
    ///   - loops: the loops that must not stand still.
    ///   - program: this program.
    public init(_ loops: EventLoopGroup, program: String) throws {
        var ends: [Int32] = [-1, -1]
        guard xd_pipe(&ends) == 0 else { throw ChannelError.system("make a pipe", errno) }
        defer { close(ends[0]) }
        process = try EmulatorProcess.start(
            [program, "export-watchdog", "--parent", "\(getpid())", "--pipe", "\(ends[0])"],
            directory: "/",
            log: "/dev/null",
            keep: [ends[0]]
        )
        let output = ends[1]
        pipe = output
        _ = fcntl(output, F_SETFL, O_NONBLOCK)
        task = Task.detached {
            while !Task.isCancelled {
                for loop in loops.loops { try? await loop.run {} }
                var byte: UInt8 = 1
                _ = write(output, &byte, 1)
                try? await Task.sleep(for: .seconds(1))
            }
        }
    }

    /// Ends it: nothing depends on this process any more.
    public func end() {
        task.cancel()
        process.signal(SIGKILL)
        close(pipe)
    }

    /// What the other process does: it ends its parent when there was no beat for a while. Blocks.
    ///
    /// - Parameters:
    ///   - parent: the process that beats.
    ///   - pipe: where the beats come from.
    public static func watch(parent: Int32, pipe: Int32) {
        let process = xd_pidfd_open(parent)
        guard process >= 0 else { return }
        var buffer = [UInt8](repeating: 0, count: 64)
        while true {
            var event = pollfd(fd: pipe, events: Int16(POLLIN), revents: 0)
            let ready = poll(&event, 1, Int32(patience) * 1000)
            if ready < 0, errno == EINTR { continue }
            if ready == 0 {
                _ = xd_pidfd_signal(process, SIGKILL)
                return
            }
            // The end of the pipe is the end of the parent.
            if read(pipe, &buffer, buffer.count) <= 0 { return }
        }
    }
}
