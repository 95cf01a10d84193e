internal import CLinux
internal import Glibc
public import IO

/// A process that lets a guest go on when whoever stopped it for a snapshot does not.
///
/// It waits for the end of this process, or of the time; then it ends this process, whose connections would be in its way,
/// and does what was left undone over connections of its own: file systems are thawed, processors run.
public final class SnapshotWatchdog: Sendable {
    private let process: EmulatorProcess

    /// Starts it.
    ///
    /// - Parameters:
    ///   - agent: the socket of the agent that is about to freeze; nil when nothing is frozen.
    ///   - monitor: the monitor of a guest that is about to be paused; nil when it is not.
    ///   - seconds: how long it may take.
    ///   - program: this program.
    public init(agent: String?, monitor: String?, seconds: Int, program: String) throws {
        var arguments = [program, "snapshot-watchdog", "--parent", "\(getpid())", "--seconds", "\(seconds)"]
        if let agent { arguments += ["--agent", agent] }
        if let monitor { arguments += ["--monitor", monitor] }
        process = try EmulatorProcess.start(arguments, directory: "/", log: "/dev/null")
    }

    /// Ends it: the guest goes on.
    public func dismiss() { process.signal(SIGKILL) }

    /// What the watchdog does.
    ///
    /// - Parameters:
    ///   - parent: who stopped the guest.
    ///   - agent: the agent's socket.
    ///   - monitor: the monitor's socket.
    ///   - seconds: how long it may take.
    ///   - loop: where its connections live.
    public static func watch(parent: Int32, agent: String?, monitor: String?, seconds: Int, on loop: EventLoop) async {
        let process = xd_pidfd_open(parent)
        await BlockingPool.shared.value {
            // A parent that is gone already cannot be opened.
            guard process >= 0 else { return }
            var event = pollfd(fd: process, events: Int16(POLLIN), revents: 0)
            if poll(&event, 1, Int32(seconds) * 1000) > 0 { return }
            _ = xd_pidfd_signal(process, SIGKILL)
            _ = poll(&event, 1, 10_000)
        }
        let end = ContinuousClock.now + .seconds(120)
        var needsAgent = agent != nil
        var needsMonitor = monitor != nil
        while needsAgent || needsMonitor, ContinuousClock.now < end {
            let (askAgent, askMonitor) = (needsAgent, needsMonitor)
            let done = try? await loop.run { () -> (Bool, Bool) in
                var done = (!askAgent, !askMonitor)
                // The processors first: an agent in a guest that is paused cannot answer.
                if askMonitor, let monitor,
                    let client = try? await QMPClient.connect(to: monitor, on: loop, timeout: .seconds(5))
                {
                    if (try? await client.status()) == "paused" { _ = try? await client.resume() }
                    let now = try? await client.status()
                    done.1 = now != nil && now != "paused"
                    client.close()
                }
                if askAgent, let agent,
                    let client = try? await GuestAgent.connect(to: agent, on: loop, timeout: .seconds(5))
                {
                    done.0 = (try? await client.thaw()) != nil
                    client.close()
                }
                return done
            }
            if done?.0 == true { needsAgent = false }
            if done?.1 == true { needsMonitor = false }
            if needsAgent || needsMonitor { _ = await BlockingPool.shared.value { usleep(200_000) } }
        }
    }
}
