internal import CLinux
internal import Glibc
internal import IO

/// A process that lets a guest go on when whoever stopped it for a snapshot does not.
///
/// It has the connections to the guest agent and to the monitor, and acts when this process ends, or when the time is over:
/// file systems are thawed, processors run.
public final class SnapshotWatchdog: Sendable {
    private let process: EmulatorProcess

    /// Starts it.
    ///
    /// - Parameters:
    ///   - agent: the agent that is about to freeze; nil when there is none.
    ///   - monitor: the monitor of a guest that is about to be paused; nil for one that is paused anyway.
    ///   - seconds: how long it may take.
    ///   - program: this program.
    public init(agent: GuestAgent?, monitor: QMPClient?, seconds: Int, program: String) throws {
        var arguments = [program, "snapshot-watchdog", "--parent", "\(getpid())", "--seconds", "\(seconds)"]
        var kept: [Int32] = []
        if let agent {
            arguments += ["--agent", "\(agent.descriptor)"]
            kept.append(agent.descriptor)
        }
        if let monitor {
            arguments += ["--monitor", "\(monitor.descriptor)"]
            kept.append(monitor.descriptor)
        }
        process = try EmulatorProcess.start(arguments, directory: "/", log: "/dev/null", keep: kept)
    }

    /// Ends it: the guest goes on.
    public func dismiss() { process.signal(SIGKILL) }

    /// What the watchdog does: waits for the end of its parent or of the time, and lets the guest go on. Blocks.
    ///
    /// - Parameters:
    ///   - parent: who stopped the guest.
    ///   - agent: the agent's connection; negative for none.
    ///   - monitor: the monitor's connection; negative for none.
    ///   - seconds: how long it may take.
    public static func watch(parent: Int32, agent: Int32, monitor: Int32, seconds: Int) {
        let process = xd_pidfd_open(parent)
        var event = pollfd(fd: process, events: Int16(POLLIN), revents: 0)
        // A parent that is gone already cannot be opened.
        if process >= 0 { _ = poll(&event, 1, Int32(seconds) * 1000) }
        // What the parent may have sent half of ends with a line, or with the byte that the agent takes for one.
        let messages: [(Int32, [UInt8])] = [
            (agent, [0xff] + Array(#"{"execute":"guest-fsfreeze-thaw"}"#.utf8) + [10]),
            (monitor, [10] + Array(#"{"execute":"cont"}"#.utf8) + [10]),
        ]
        for (descriptor, bytes) in messages where descriptor >= 0 {
            _ = fcntl(descriptor, F_SETFL, 0)
            _ = bytes.withUnsafeBytes { write(descriptor, $0.baseAddress, $0.count) }
        }
        // The connections stay until what was sent was read.
        for (descriptor, _) in messages where descriptor >= 0 {
            var answer = [UInt8](repeating: 0, count: 4096)
            var ready = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
            if poll(&ready, 1, 5000) > 0 { _ = read(descriptor, &answer, answer.count) }
        }
    }
}
