internal import Emulator
internal import IO
internal import Migration

/// The guest belongs to this host: it is as it was, and the destination knows.
extension OutgoingMigration {
    func writeReclaimed(_ reason: String) async -> SourceHandover.Event {
        while true {
            do {
                try await journal?.write(.reclaimed(reason: reason))
                return .written
            } catch {
                // A disk that is full may be emptied.
                context.warn("Guest '\(plan.guest)' stays paused until this can be written: \(error)")
                await context.loop.sleep(for: .seconds(1))
            }
        }
    }

    func restore(_ rollBack: SourceHandover.RollBack) async -> SourceHandover.Event {
        let reason = rollBack.reason
        deadline?.cancel()
        link.shield()
        context.report.outcome = .rolledBack
        context.report.reason = reason.message
        context.report.obstacles = reason.obstacles.isEmpty ? nil : reason.obstacles
        context.report.code = reason.code.rawValue
        memory.abort(reason.message)
        mirrors.abort(reason.message)
        guard rollBack.hasTouchedGuest else {
            await mirrors.closeRelays()
            return .restored(true)
        }
        var problem = await liftFence()
        if problem == nil { problem = await restoreGuest() }
        // The rest may take as long as the destination is away.
        if problem == nil { watchdog?.guestRuns() }
        await mirrors.closeRelays()
        if let problem {
            context.warn(
                "Guest '\(plan.guest)' may not be as it was: \(problem). Run 'crossdock recover \(plan.id)' once that is settled"
            )
        }
        return .restored(problem == nil)
    }

    /// - Returns: what is not as it was; nil when everything is. A QEMU that has ended has nothing to restore.
    func restoreGuest() async -> String? {
        if record?.isOff == true {
            await switchOff()
            return nil
        }
        guard let record, record.process?.isRunning == true else { return nil }
        if monitor?.isConnected != true {
            monitor = try? await context.guests.connect(to: record, on: context.loop)
        }
        var problem: String? = "its monitor does not answer"
        if let monitor, monitor.isConnected {
            problem = await GuestRestoration(
                monitor: monitor,
                guest: watch?.guest ?? notedGuest,
                fence: fence,
                say: { self.context.warn("Guest '\(self.plan.guest)': \($0)") }
            ).run()
            await memory.forgetSettings(monitor)
        }
        // The monitor of a QEMU that ends is gone a moment before it is.
        for _ in 0..<100 where problem != nil && monitor?.isConnected != true && record.process?.isRunning == true {
            await context.loop.sleep(for: .milliseconds(20))
        }
        return record.process?.isRunning == true ? problem : nil
    }

    /// A destination that was asked to prepare keeps everything until it hears this.
    func tell(_ rollBack: SourceHandover.RollBack) async -> SourceHandover.Event {
        if let overruler { return .told(await tellOverruling(by: overruler)) }
        let patience: Duration? =
            switch rollBack.telling {
            case .needless: nil
            case .helpful: .seconds(10)
            case .needed: .seconds(30)
            }
        switch await link.tell(rollBack.reason.message, patience: patience) {
        case .acknowledged(let words):
            if let words { context.warn("\(plan.host) says: \(words)") }
            return .told(true)
        // Who was never asked to prepare cannot have been taken.
        case .overruled(let by): return rollBack.telling == .needed ? .overruled(by: by) : .told(true)
        case .silent:
            // Before it was asked to prepare it gives up by itself.
            guard rollBack.telling == .needed else { return .told(true) }
            context.warn(
                "The destination \(plan.host) could not be told of the roll-back and keeps its copy, paused; run 'crossdock recover "
                    + "\(plan.id)' once it can be reached"
            )
            return .told(false)
        }
    }

    func writeRolledBack(_ reason: String) async throws -> SourceHandover.Event {
        do { try await journal?.write(.rolledBack(reason: reason)) } catch {
            context.warn("\(error)")
            throw error
        }
        return .written
    }
}
