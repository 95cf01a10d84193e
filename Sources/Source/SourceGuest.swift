internal import Emulator
internal import Glibc
internal import IO
internal import Migration

/// The guest that is to be moved: its record, its monitor, and the lock that keeps other migrations of it away.
struct SourceGuest {
    /// What this host knows of it.
    let record: GuestRecord
    /// QEMU.
    let monitor: QMPClient
    /// The lock of its journals.
    let lock: FileLock

    /// Finds a guest and sees that this migration may begin.
    ///
    /// - Throws: `MigrationError` saying why not.
    static func open(_ context: MigrationContext) async throws -> SourceGuest {
        let plan = context.plan
        do {
            try GuestStore.validate(plan.guest)
            guard let lock = try context.migrations.lock(guest: plan.guest) else {
                throw MigrationError(.busy, "Guest '\(plan.guest)' is being migrated already; see 'crossdock status'")
            }
            if let bar = try context.migrations.startBar(of: plan.guest) {
                throw MigrationError(.guest, bar.sentence(guest: plan.guest))
            }
            let (record, monitor) = try await connect(context)
            let guest = SourceGuest(record: record, monitor: monitor, lock: lock)
            do { try await guest.clear(context) } catch {
                monitor.close()
                throw error
            }
            return guest
        } catch let error as GuestError {
            throw MigrationError(.guest, error.message)
        } catch let error as QMPError {
            throw MigrationError(.guest, "The monitor of guest '\(plan.guest)': \(error.message)")
        }
    }

    /// The monitor of a guest that is known here, or of a running QEMU that is adopted for this migration.
    private static func connect(_ context: MigrationContext) async throws -> (GuestRecord, QMPClient) {
        let plan = context.plan
        if let socket = plan.monitor {
            context.forgetsGuest = try plan.isRehearsal && context.guests.load(plan.guest) == nil
            let (adopted, monitor) = try await context.guests.adopt(plan.guest, monitor: socket, on: context.loop)
            guard let monitor else {
                throw MigrationError(
                    .guest,
                    "The monitor \(socket) of guest '\(plan.guest)' is held by another client; end that, or give QEMU a second one"
                )
            }
            return (adopted, monitor)
        }
        guard let found = try context.guests.load(plan.guest) else {
            throw context.guests.unknown(plan.guest)
        }
        guard let process = found.process, process.isRunning else { return try await bringUp(found, context) }
        do {
            return (found, try await context.guests.connect(to: found, on: context.loop))
        } catch let error as ChannelError {
            throw MigrationError(.guest, "The monitor of guest '\(plan.guest)' cannot be reached: \(error.message)")
        }
    }

    /// Starts the QEMU of a guest that is off, without running it: what there is to move is then found out and compared as ever.
    private static func bringUp(_ found: GuestRecord, _ context: MigrationContext) async throws -> (
        GuestRecord, QMPClient
    ) {
        let name = context.plan.guest
        if let secrets = found.secrets, !secrets.isEmpty {
            throw MigrationError(
                .guest,
                "Guest '\(name)' does not run, and its secrets (\(secrets.joined(separator: ", "))) are kept nowhere; start it, then migrate it"
            )
        }
        if found.adopted != nil {
            throw MigrationError(
                .guest,
                "Guest '\(name)' was started by something else and does not run; start it there, then migrate it"
            )
        }
        context.warn("Guest '\(name)' does not run here, and moves as one that is off")
        var record = found
        record.isOff = true
        do {
            let monitor = try await context.guests.start(&record, extra: ["-S"], on: context.loop)
            return (record, monitor)
        } catch {
            try? await context.guests.switchOff(&record)
            throw MigrationError(
                .guest,
                "The QEMU of guest '\(name)', which is off, cannot be started for its move: \(error)"
            )
        }
    }

    /// Sees that the guest is in a state in which it can move, and removes what earlier work on it has left.
    private func clear(_ context: MigrationContext) async throws {
        let plan = context.plan
        let earlier = EarlierMigrations(context)
        let state = try await monitor.runState()
        if case .stays(let why) = state.verdict {
            let remedy = earlier.latest.map { "; 'crossdock recover \($0)' ends what an earlier migration left" }
            throw MigrationError(.guest, "Guest '\(plan.guest)' cannot move: \(why)\(remedy ?? "")")
        }
        if !plan.isRehearsal { try await earlier.settle() }
        // What an export that was killed has left in QEMU.
        guard try FileLock(context.guests.exportLock(of: plan.guest)) != nil else {
            throw MigrationError(
                .busy,
                "The disks of guest '\(plan.guest)' are exported by 'crossdock export'; its readers would be left behind. End that first"
            )
        }
        if plan.isRehearsal { return }
        try await GuestExport.clear(record, context.guests, monitor)
        // The lock is ours, so nobody uses what a source agent that was killed has left.
        await GuestRestoration(monitor: monitor, guest: state).removeLeftovers()
        guard state != .running, record.isOff != true else { return }
        // It may have come here standing, by something that left that to whoever resumes it.
        do { try await monitor.activateImages() } catch {
            throw MigrationError(
                .guest,
                "QEMU does not take control of the images of guest '\(plan.guest)', which stands still: \(error). Resume it, or see what "
                    + "else uses the images"
            )
        }
    }
}
