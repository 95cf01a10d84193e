internal import Emulator
internal import IO
internal import Migration

/// What the guest is doing, apart from what its migration does to it: it follows QEMU's events.
///
/// QEMU sends one STOP whoever stopped the guest. `query-status` at once tells them apart: for the migration's own it is
/// `finish-migrate`. Confined to the control loop.
final class GuestWatch: @unchecked Sendable {
    // Unchecked: confined to the control loop.
    private let context: MigrationContext
    private let monitor: QMPClient
    /// What the guest was doing last, by itself or by somebody else's word.
    private(set) var guest: RunState
    /// When the migration stopped it; nil while it runs, and when it did not run.
    private(set) var stoppedAt: ContinuousClock.Instant?
    /// Whether QEMU waits at pre-switchover.
    private(set) var isAtSwitchover = false
    /// How often QEMU said that it runs the guest again.
    private(set) var resumes = 0
    /// Whether a migration is under way, so that a STOP may be its own.
    var isMigrating = false
    /// How many looks at the state are under way.
    private var looks = 0
    /// Is told when a pause of the migration's own begins, and when it turns out to be none.
    var onPause: ((ContinuousClock.Instant?) -> Void)?
    /// Is told when the guest does something else.
    var onChange: ((RunState) -> Void)?

    init(_ context: MigrationContext, _ monitor: QMPClient) async throws {
        self.context = context
        self.monitor = monitor
        guest = try await monitor.runState()
    }

    func handle(_ event: QMPEvent) {
        switch event.name {
        case "STOP":
            // A pause has a bound from its first moment on; whose it is turns out soon.
            if isMigrating, stoppedAt == nil {
                stoppedAt = event.received
                onPause?(event.received)
            }
            look()
        case "RESUME":
            resumes += 1
            look()
        case "SUSPEND", "WAKEUP", "GUEST_PANICKED", "WATCHDOG", "BLOCK_IO_ERROR", "RESET": look()
        case "MIGRATION":
            if event.data["status"]?.string == "pre-switchover" {
                isAtSwitchover = true
                if stoppedAt == nil { onPause?(event.received) }
            }
        case "SHUTDOWN" where event.data["reason"]?.string != "guest-reset":
            context.fail(MigrationError(.failed, "The guest shut down while it was migrated"))
        default: break
        }
    }

    private func look() {
        looks += 1
        Task(executorPreference: context.loop) {
            defer {
                self.looks -= 1
                self.context.wake()
            }
            guard let state = try? await self.monitor.runState() else { return }
            self.see(state)
        }
    }

    private func see(_ state: RunState) {
        // The migration's doing says nothing about the guest.
        if state.isOfMigration { return }
        // A reset of what a migration has stopped looks like a guest that never ran.
        if state == .prelaunch, isAtSwitchover { return }
        if state != .running, stoppedAt != nil, !isAtSwitchover {
            // Somebody else's pause, or the guest's own: it has no deadline.
            stoppedAt = nil
            onPause?(nil)
        }
        guard state != guest else { return }
        guest = state
        onChange?(state)
    }

    /// Waits until what QEMU has said of the guest so far is known.
    func settle() async throws {
        while looks > 0 { try await context.wait(.milliseconds(50)) }
    }

    /// Another attempt begins: the guest goes on.
    func reset() {
        stoppedAt = nil
        isAtSwitchover = false
        isMigrating = false
    }
}

extension QMPClient {
    /// `query-status`, as a value.
    ///
    /// - Throws: `QMPError`; a state that is not known is one.
    func runState() async throws -> RunState {
        let status = try await status()
        guard let state = RunState(rawValue: status) else {
            throw QMPError(.malformed, "QEMU says that the guest is in the state '\(status)', which is not known")
        }
        return state
    }
}
