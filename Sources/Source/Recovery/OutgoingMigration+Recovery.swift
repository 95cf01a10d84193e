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
    /// - Parameters:
    ///   - operatorName: who takes the guest for this host although it was released, which `Recovery` has made sure of;
    ///     nil to wait for the destination.
    ///   - reason: why the agent has ended, as a sentence; nil when that is not known.
    /// - Returns: the report.
    /// - Throws: `MigrationError` with `busy` when the agent still lives, `guest` when there is nothing to recover.
    public func recover(
        takenBy operatorName: String? = nil,
        because reason: String? = nil
    ) async throws -> MigrationReport {
        endOfAgent = reason
        return try await context.loop.run { try await self.resumeFromJournal(operatorName) }
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

    private var nothingToRecover: MigrationError {
        MigrationError(.guest, "Migration \(plan.id) has nothing to recover; see 'crossdock status'")
    }

    private func resumeFromJournal(_ operatorName: String?) async throws -> MigrationReport {
        guard let lock = try context.migrations.lock(guest: plan.guest) else {
            throw MigrationError(
                .busy,
                "Another process works on migration \(plan.id) of guest '\(plan.guest)'; see 'crossdock status'"
            )
        }
        guestLock = lock
        let files = context.files
        files.enter(.recovery)
        defer {
            files.leave(.recovery)
            guestLock = nil
        }
        context.report.isRecovered = true
        guard let reading = try context.migrations.reading(of: plan.id), case .source(let standing) = reading.standing,
            Self.isUnfinished(plan.id, reading, context.migrations, context.guests)
        else { throw nothingToRecover }
        journal = try Journal(opening: files.journal)
        if try context.migrations.isSuperseded(plan.id, of: plan.guest) {
            try await leaveToLater(standing)
        } else {
            guard operatorName == nil || standing == .released else {
                throw MigrationError(.guest, "Who owns guest '\(plan.guest)' is known; see 'crossdock status'")
            }
            guard let known = try context.guests.load(plan.guest) else {
                throw MigrationError(.guest, "The record of guest '\(plan.guest)' is gone")
            }
            record = known
            restoreDisks(known)
            try await act(on: standing, operatorName)
        }
        removeSockets()
        link.close()
        monitor?.close()
        if let began = MigrationStore.began(plan.id) {
            context.report.totalMS = Double(max(0, time(nil) - began)) * 1000
        }
        if let text = try? MigrationReportFile.save(context.report, context.migrations) { context.warn(text) }
        return context.report
    }

    /// A later migration has decided about the guest: neither QEMU nor the images are this one's to touch.
    private func leaveToLater(_ standing: SourceStanding) async throws {
        switch standing {
        case .open, .reclaimed, .taken:
            context.report.outcome = .rolledBack
            guard try await !settleDebt(standing) else { return }
            // Who has taken a guest does not wait for the other host.
            if case .taken = standing { return }
            context.report.code = MigrationError.Code.failed.rawValue
        case .released, .confirmed, .overruled, .rolledBack:
            throw MigrationError(.guest, "Migration \(plan.id) was followed by a later one of guest '\(plan.guest)'")
        }
    }

    private func act(on standing: SourceStanding, _ operatorName: String?) async throws {
        var standing = standing
        if let operatorName {
            try journal?.append(.taken(by: operatorName))
            standing = .taken(by: operatorName)
        }
        switch standing {
        case .confirmed, .overruled, .rolledBack:
            try await removeWhatWasLeft()
            return
        case .open, .reclaimed:
            // Its images first: QEMU opens them by their names when it goes on.
            try await giveImagesBack()
            // Without its monitor nothing can be said about the guest, so nothing is decided about it.
            try await connectMonitor()
        case .taken(let by):
            overruler = by
            try await giveImagesBack()
            try await connectMonitor()
        // QEMU is frozen, and is not to be used before the guest belongs to this host again.
        case .released: break
        }
        let reason =
            overruler.map { "\($0) has taken the guest for this host" }
            ?? endOfAgent ?? "The source agent ended before the guest was released"
        let resumed = SourceHandover.resuming(
            standing,
            guest: Self.noted(context.files),
            reason: MigrationError(.failed, reason)
        )
        guard let resumed else { throw nothingToRecover }
        handover = resumed
        await carryOut()
        await settleReport()
    }

    private func giveImagesBack() async throws {
        guard let problem = await liftFence() else { return }
        throw MigrationError(
            .failed,
            "Guest '\(plan.guest)' belongs to this host and must not go on yet: \(problem). Then run 'crossdock recover \(plan.id)' again"
        )
    }

    /// The roll-back is what was asked for; what is left of it is in the warnings.
    private func settleReport() async {
        switch handover {
        case .over(.rolledBack(_, let isClosed)):
            // That the other host does not know yet that it was overruled is no failure.
            context.report.code = isClosed || overruler != nil ? 0 : MigrationError.Code.failed.rawValue
            if mayRunTwice { context.report.code = MigrationError.Code.undecided.rawValue }
        case .over(.overruled(let by)): await learnOverruling(by)
        default: break
        }
    }

    /// The guest has long been there; only what it left behind is still here.
    private func removeWhatWasLeft() async throws {
        if let process = record?.process, process.isRunning, !process.isFrozen {
            try await connectMonitor()
            // A QEMU that is in another state than the one in which a migration ends is somebody else's.
            if let monitor, try await monitor.runState() != .postmigrate { throw nothingToRecover }
        }
        context.report.outcome = .migrated
        rememberRelease()
        await endEmulator()
    }

    private func connectMonitor() async throws {
        guard let record, record.process?.isRunning == true else { return }
        monitor = try await context.guests.connect(to: record, on: context.loop)
    }

    private func restoreDisks(_ record: GuestRecord) {
        fence = ImageFence(
            recovering: plan.id,
            guest: plan.guest,
            process: record.process,
            in: context.migrations
        )
        for (index, saved) in SavedDisk.load(context.files).enumerated() {
            let name = "disk\(index)"
            var disk = SourceDisk(
                offer: .init(name: name, size: saved.size, allocated: 0, path: saved.path),
                node: "",
                path: saved.path
            )
            disk.format = saved.format
            disk.dataPath = saved.data?.path
            disk.isSealed = saved.isSealed
            disk.lineages = saved.lineages ?? []
            mirrors.disks.append(disk)
            context.report.disks.append(.init(name: name, size: saved.size))
        }
    }
}
