internal import CLinux
internal import Emulator
internal import Glibc
internal import IO
internal import Migration

/// A process that looks after a guest which may be paused for the switchover when its source agent dies or stands still.
///
/// QEMU waits at pre-switchover for ever, with the guest stopped, and its monitor serves one client only. So the watchdog
/// inherits the agent's conversation. Before it acts it ends the agent and waits until that is dead, takes the lock of the
/// guest's journals and reads the journal again: the guest is resumed unless RELEASED is there. Then it does what
/// `crossdock recover` does.
public final class SwitchoverWatchdog: @unchecked Sendable {
    // Unchecked: confined to the loop.
    private let process: EmulatorProcess
    private let pipe: Int32
    private let loop: EventLoop
    private var pausedSince: UInt64 = 0
    private var isDismissed = false
    /// The how many'th of its migration, from 0.
    let number: Int
    /// Is told when it has ended although nobody dismissed it.
    var onEnd: (() -> Void)?

    /// What goes through the pipe.
    private struct Beat {
        /// The monotonic clock, in nanoseconds.
        var now: UInt64
        /// Since when the guest is paused; 0 while it is not.
        var pausedSince: UInt64
    }

    private static var clock: UInt64 {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    }

    /// How long the agent may stand still while the guest runs, in milliseconds.
    private static func patience(_ deadline: Int) -> Int { max(deadline, 3000) }
    private static let interval = Duration.milliseconds(100)

    /// Starts it. Called on the loop that must not stand still.
    ///
    /// - Parameters:
    ///   - plan: the migration.
    ///   - monitor: the descriptor of the agent's connection to QEMU's monitor.
    ///   - loop: the loop.
    ///   - number: the how many'th of its migration it is.
    init(_ plan: MigrationPlan, monitor: Int32, beating loop: EventLoop, number: Int) throws {
        var ends: [Int32] = [-1, -1]
        guard xd_pipe(&ends) == 0 else { throw ChannelError.system("make a pipe", errno) }
        defer { close(ends[0]) }
        let files = MigrationStore(stateDirectory: plan.stateDirectory).files(of: plan.id)
        do {
            process = try EmulatorProcess.start(
                [DurableFile.resolve("/proc/self/exe", in: "/")]
                    + SourceProcess.watchdog(plan: files.plan, parent: getpid(), pipe: ends[0], monitor: monitor)
                    .arguments,
                directory: "/",
                log: files.log(.watchdog),
                keep: [ends[0], monitor]
            )
        } catch {
            close(ends[1])
            throw error
        }
        try? DurableFile.write(try JSONText.encode(process), to: files.process(.watchdog))
        pipe = ends[1]
        _ = fcntl(pipe, F_SETFL, O_NONBLOCK)
        self.loop = loop
        self.number = number
        beat()
    }

    private func beat() {
        guard !isDismissed else { return }
        guard send() else {
            onEnd?()
            onEnd = nil
            return
        }
        _ = loop.schedule(after: Self.interval) { self.beat() }
    }

    /// Returns whether there is anybody who might hear it.
    @discardableResult private func send() -> Bool {
        var beat = Beat(now: Self.clock, pausedSince: pausedSince)
        // Less than what a pipe takes at once, so a beat is never torn; one that does not fit is not missed.
        return write(pipe, &beat, MemoryLayout<Beat>.size) >= 0 || errno != EPIPE
    }

    func guestStopped(at instant: ContinuousClock.Instant) {
        let ago = (ContinuousClock.now - instant) / .nanoseconds(1)
        pausedSince = Self.clock - UInt64(max(ago, 0))
        send()
    }

    func guestRuns() {
        pausedSince = 0
        send()
    }

    /// It belongs to the other side now: there is no hurry any more.
    func guestIsReleased() { guestRuns() }

    /// Whether there is anybody who would act.
    var isAlive: Bool { process.isRunning }

    /// Ends it: the guest is in good hands.
    func dismiss() {
        guard !isDismissed else { return }
        isDismissed = true
        onEnd = nil
        process.signal(SIGKILL)
        close(pipe)
    }

    // MARK: The other process

    /// Waits until the agent has ended, or has to be ended. Blocks.
    ///
    /// - Parameters:
    ///   - parent: the agent.
    ///   - pipe: where its beats come from.
    ///   - deadline: the blackout deadline in milliseconds.
    /// - Returns: `died` when it is certain that the agent is dead.
    private static func waitForDeath(of parent: Int32, pipe: Int32, deadline: Int) -> Verdict {
        let process = xd_pidfd_open(parent)
        // An agent that is gone already cannot be opened.
        guard process >= 0 else { return errno == ESRCH ? .died(why: nil) : .isUnknown }
        var why: String?
        var last = Beat(now: clock, pausedSince: 0)
        while true {
            let now = clock
            var limit = last.now + UInt64(patience(deadline)) * 1_000_000
            if last.pausedSince != 0 {
                // An agent that still beats is at work on it.
                let isSilent = now > last.now + 300_000_000
                limit = min(limit, last.pausedSince + UInt64(deadline + (isSilent ? 30 : 5000)) * 1_000_000)
            }
            if now >= limit {
                let silence = "it had not been heard for \((now - min(last.now, now)) / 1_000_000) ms"
                let pause =
                    last.pausedSince == 0
                    ? "" : ", and the guest was paused for \((now - min(last.pausedSince, now)) / 1_000_000) ms"
                why = "The source agent was ended by its watchdog: \(silence)\(pause)"
                break
            }
            var events = [
                pollfd(fd: pipe, events: Int16(POLLIN), revents: 0),
                pollfd(fd: process, events: Int16(POLLIN), revents: 0),
            ]
            let wait = min((limit - now) / 1_000_000 + 1, last.pausedSince == 0 ? 1000 : 20)
            if poll(&events, 2, Int32(wait)) < 0, errno != EINTR { break }
            if events[1].revents != 0 { return .died(why: nil) }
            if events[0].revents != 0 {
                var beat = Beat(now: 0, pausedSince: 0)
                let count = read(pipe, &beat, MemoryLayout<Beat>.size)
                // The end of the pipe is the end of the agent.
                if count == 0 { break }
                if count == MemoryLayout<Beat>.size { last = beat }
            }
        }
        _ = xd_pidfd_signal(process, SIGKILL)
        var event = pollfd(fd: process, events: Int16(POLLIN), revents: 0)
        while poll(&event, 1, -1) < 0, errno == EINTR {}
        return event.revents != 0 ? .died(why: why) : .isUnknown
    }

    /// What became of an agent.
    enum Verdict: Sendable {
        /// It is dead; `why` says so when it had to be ended.
        case died(why: String?)
        /// It may live, and is not to be disturbed.
        case isUnknown
    }

    /// What the other process does before the recovery.
    ///
    /// - Parameters:
    ///   - plan: the migration.
    ///   - parent: the agent.
    ///   - pipe: where its beats come from.
    ///   - monitor: its connection to QEMU.
    ///   - loop: where that is used.
    /// - Returns: `died` when the migration is to be recovered.
    static func watch(
        _ plan: MigrationPlan,
        parent: Int32,
        pipe: Int32,
        monitor: Int32,
        on loop: EventLoop
    ) async -> Verdict {
        let verdict = await BlockingPool.shared.value {
            waitForDeath(of: parent, pipe: pipe, deadline: plan.blackoutDeadline)
        }
        guard case .died = verdict else { return verdict }
        let migrations = MigrationStore(stateDirectory: plan.stateDirectory)
        // Somebody who is faster with the lock does the same.
        guard let lock = try? migrations.lock(guest: plan.guest) else { return verdict }
        defer { withExtendedLifetime(lock) {} }
        guard case .source(let standing) = (try? migrations.reading(of: plan.id))?.standing, standing.mayRunHere else {
            // The monitor serves one client, and the recovery wants to be that.
            close(monitor)
            return verdict
        }
        // The agent may have fenced the images on its way to the release, and frozen QEMU, whose monitor says nothing then.
        let process = ((try? GuestStore(stateDirectory: plan.stateDirectory).load(plan.guest)) ?? nil)?.process
        let fence = ImageFence(recovering: plan.id, guest: plan.guest, process: process, in: migrations)
        guard fence.lift().isEmpty else {
            // It would go on with what has taken an image's name. The recovery says so.
            close(monitor)
            return verdict
        }
        try? process?.thaw()
        let guest = OutgoingMigration.noted(migrations.files(of: plan.id))
        try? await loop.run {
            let channel = try SocketChannel(adopting: monitor, on: loop, peerName: "QEMU's monitor")
            let client = try await QMPClient.resume(over: channel)
            defer { client.close() }
            _ = await GuestRestoration(monitor: client, guest: guest, fence: fence).resume()
        }
        return verdict
    }
}
