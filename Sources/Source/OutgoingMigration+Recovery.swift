public import Emulator
internal import Glibc
internal import IO
public import Migration
internal import TLS

/// What is done about a migration whose source agent has died.
extension OutgoingMigration {
    /// Ends a migration whose source agent has died, from what its journal says.
    ///
    /// Without RELEASED the guest belongs to this host: jobs and nodes that are left are removed, a paused guest is
    /// resumed, the destination is told. With RELEASED it belongs to the destination, which is asked until it answers: it
    /// has the guest, or it will never run it.
    ///
    /// - Parameter operatorName: who takes the guest for this host although it was released, which `Recovery` has made sure of;
    ///   nil to wait for the destination.
    /// - Returns: the report.
    /// - Throws: `MigrationError` with `busy` when the agent still lives, `guest` when there is nothing to recover.
    public func recover(takenBy operatorName: String? = nil) async throws -> MigrationReport {
        try await loop.run { try await self.resumeFromJournal(operatorName) }
    }

    /// Whether there is something left to do about a migration that started here and whose agent has ended.
    public static func isUnfinished(
        _ id: String,
        _ reading: JournalReading,
        _ migrations: MigrationStore,
        _ guests: GuestStore
    ) -> Bool {
        guard case .source(let standing) = reading.standing else { return false }
        switch standing {
        case .rolledBack, .overruled: return false
        case .open, .released, .reclaimed, .taken: return true
        case .confirmed:
            // What it left behind may still be here.
            guard (try? migrations.isSuperseded(id, of: reading.guest)) == false else { return false }
            let record = (try? guests.load(reading.guest)) ?? nil
            return record != nil && record?.released?.migration != id || record?.process?.isRunning == true
                || !migrations.files(of: id).sockets.isEmpty
        }
    }

    private func resumeFromJournal(_ operatorName: String?) async throws -> MigrationReport {
        guard let lock = try migrations.lock(guest: plan.guest) else {
            throw MigrationError(
                .busy,
                "Another process works on migration \(plan.id) of guest '\(plan.guest)'; see 'crossdock status'"
            )
        }
        guestLock = lock
        let files = migrations.files(of: plan.id)
        files.enter(.recovery)
        defer {
            files.leave(.recovery)
            guestLock = nil
        }
        guard let reading = try migrations.reading(of: plan.id), case .source(let standing) = reading.standing,
            Self.isUnfinished(plan.id, reading, migrations, guests)
        else {
            throw MigrationError(.guest, "Migration \(plan.id) has nothing to recover; see 'crossdock status'")
        }
        journal = try Journal(opening: files.journal)
        if try migrations.isSuperseded(plan.id, of: plan.guest) {
            try await leaveToLater(standing)
        } else {
            guard operatorName == nil || standing == .released else {
                throw MigrationError(.guest, "Who owns guest '\(plan.guest)' is known; see 'crossdock status'")
            }
            guard let known = try guests.load(plan.guest) else {
                throw MigrationError(.guest, "The record of guest '\(plan.guest)' is gone")
            }
            record = known
            restoreDisks()
            try await act(on: standing, operatorName)
        }
        removeSockets()
        control?.close()
        monitor?.close()
        if let text = try? MigrationReportFile.save(report, migrations) { warn(text) }
        return report
    }

    /// A later migration has decided about the guest: neither QEMU nor the images are this one's to touch.
    private func leaveToLater(_ standing: SourceStanding) async throws {
        switch standing {
        case .taken(let by):
            report.outcome = .rolledBack
            if await tellOverruling(by: by) {
                try journal?.append(.rolledBack(reason: "\(by) has taken the guest for this host"))
            }
        case .open:
            try journal?.append(.rolledBack(reason: Self.superseded))
            fallthrough
        case .released, .reclaimed, .confirmed, .overruled, .rolledBack:
            throw MigrationError(.guest, "Migration \(plan.id) was followed by a later one of guest '\(plan.guest)'")
        }
    }

    private func act(on standing: SourceStanding, _ operatorName: String?) async throws {
        switch standing {
        case .confirmed, .overruled, .rolledBack:
            // The guest has long been there; only what it left behind is still here. A QEMU that is in another state than the one
            // in which a migration ends is somebody else's.
            if let process = record?.process, process.isFrozen {
                // It was frozen for the release, and the guest is elsewhere: it never goes on.
                process.signal(SIGKILL)
            } else if record?.process?.isRunning == true {
                try await connectMonitor()
                if let monitor, try await monitor.status() != "postmigrate" {
                    throw MigrationError(.guest, "Migration \(plan.id) has nothing to recover; see 'crossdock status'")
                }
            }
            report.outcome = .migrated
            rememberRelease()
            await endEmulator()
        case .released:
            // QEMU may be frozen, and is not to be used before the guest belongs to this host again.
            isReleased = true
            if let operatorName { try await take(operatorName) } else { await complete() }
        case .open, .reclaimed:
            unfence()
            thawEmulator()
            // Without its monitor nothing can be said about the guest, so nothing is decided about it.
            try await connectMonitor()
            await takeUp(MigrationError(.failed, "The source agent ended before the guest was released"))
            if overruledBy == nil { report.code = isRolledBack ? 0 : MigrationError.Code.failed.rawValue }
        case .taken(let by):
            overruler = by
            unfence()
            thawEmulator()
            try await connectMonitor()
            await takeUp(MigrationError(.failed, "\(by) has taken the guest for this host"))
            // That the other host does not know it yet is no failure.
            report.code = 0
        }
    }

    private func connectMonitor() async throws {
        guard let record, record.process?.isRunning == true else { return }
        monitor = try await QMPClient.connect(to: guests.agentMonitor(of: record), on: loop)
    }

    /// The guest was released: the destination says what became of it.
    private func complete() async {
        if let refusal = await handOver() {
            hasMigrationStarted = true
            await takeBack(refusal)
            report.code = isRolledBack ? 0 : MigrationError.Code.failed.rawValue
        } else {
            await finish()
        }
    }

    /// The guest belongs to this host.
    private func takeUp(_ reason: MigrationError) async {
        mayBePrepared = true
        if let monitor {
            let state = try? await monitor.migrationState().status
            let status = try? await monitor.status()
            if let state, let status {
                hasMigrationStarted =
                    ["setup", "active", "pre-switchover", "device", "cancelling"].contains(state)
                    || SwitchoverWatchdog.isPause(status, ofMigration: state)
            } else {
                // It may be paused, for all that is known.
                hasMigrationStarted = true
            }
            if hasMigrationStarted { _ = try? await monitor.cancelMigration() }
            try? await clearLeftovers(monitor)
        }
        // The roll-back is what was asked for; what is left of it is in the warnings.
        await rollBack(reason)
    }

    /// The operator says that the destination will never run the guest.
    private func take(_ operatorName: String) async throws {
        try journal?.append(.taken(by: operatorName))
        isReleased = false
        overruler = operatorName
        unfence()
        thawEmulator()
        hasMigrationStarted = true
        isAwaited = false
        await rollBack(MigrationError(.failed, "\(operatorName) has taken the guest for this host"))
        report.code = 0
    }

    private func restoreDisks() {
        for (index, saved) in Self.savedDisks(of: plan.id, migrations).enumerated() {
            let name = "disk\(index)"
            var disk = SourceDisk(
                offer: .init(name: name, size: saved.size, allocated: 0, path: saved.path),
                node: "",
                path: saved.path
            )
            disk.format = saved.format
            disk.isSealed = saved.isSealed
            disks.append(disk)
            report.disks.append(.init(name: name, size: saved.size))
        }
    }
}
