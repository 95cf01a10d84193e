internal import Emulator
internal import IO
internal import Migration

/// Brings a guest's QEMU back to where it was before its migration: no migration, no jobs or nodes of ours, the guest as it was.
///
/// It goes by what QEMU says, so that it serves an agent that knows what it did, and one that takes the place of another.
struct GuestRestoration {
    /// QEMU.
    let monitor: QMPClient
    /// What the guest was doing.
    let guest: RunState
    /// Its images. A QEMU that has completed a migration opens them by their names when it goes on.
    var fence: ImageFence?
    /// Is told what is not quite as it was, and cannot be.
    var say: @Sendable (String) -> Void = { _ in }

    private var loop: EventLoop { monitor.loop }

    /// Restores it. Bounded in time.
    ///
    /// - Returns: what could not be restored, as a sentence; nil when everything is as it was.
    func run() async -> String? {
        await endMigration()
        await removeLeftovers()
        return await bringBack()
    }

    /// Cancels the migration only: the disks go on being mirrored, and another attempt may follow.
    ///
    /// - Returns: as `run`.
    func endAttempt() async -> String? {
        await endMigration()
        guard monitor.isConnected else { return "its monitor is gone" }
        if (try? await monitor.migrationState().status) == "completed" {
            return "QEMU completed the migration meanwhile"
        }
        return await restoreGuest()
    }

    /// Ends the migration, however far it came, and brings the guest back; jobs and nodes stay as they are.
    ///
    /// - Returns: as `run`.
    func resume() async -> String? {
        await endMigration()
        return await bringBack()
    }

    private func bringBack() async -> String? {
        guard monitor.isConnected else { return "its monitor is gone" }
        return await restoreGuest()
    }

    private func endMigration() async {
        guard let state = try? await monitor.migrationState().status else { return }
        guard
            ["setup", "active", "postcopy-active", "pre-switchover", "device", "wait-unplug", "cancelling"].contains(
                state
            )
        else { return }
        _ = try? await monitor.cancelMigration()
        for look in 1...500 {
            guard let state = try? await monitor.migrationState().status else { return }
            if ["cancelled", "failed", "completed", "none"].contains(state) { return }
            // What takes so long may wait for a word.
            if state == "cancelling", look % 10 == 0 { try? await monitor.wakeCancelledMigration() }
            await loop.sleep(for: .milliseconds(10))
        }
    }

    /// Removes the jobs and nodes of migrations. One of a disk's relay that is gone ends with an error, and ends.
    func removeLeftovers() async {
        for job in (try? await monitor.execute("query-jobs").array) ?? [] {
            guard let name = job["id"]?.string, name.hasPrefix("\(SourceDisk.jobPrefix)disk") else { continue }
            _ = try? await monitor.cancelMirror(name, force: true)
            for _ in 0..<1000 {
                guard let left = try? await monitor.job(name) else { break }
                if left.status == "concluded" {
                    _ = try? await monitor.dismiss(name)
                    break
                }
                await loop.sleep(for: .milliseconds(10))
            }
        }
        for node in (try? await monitor.execute("query-named-block-nodes", ["flat": true]).array) ?? [] {
            guard let name = node["node-name"]?.string, name.hasPrefix("\(SourceDisk.nodePrefix)disk") else { continue }
            _ = try? await monitor.removeNode(name)
        }
    }

    /// QEMU brings a guest back by itself after a migration that failed or was cancelled, but not after a completed one, and
    /// before QEMU 9 not when the guest did not run: it is in `postmigrate` then, whatever it was.
    private func restoreGuest() async -> String? {
        for _ in 0..<500 {
            guard let state = try? await monitor.runState() else { break }
            switch state {
            case .finishMigrate: break
            case .postmigrate, .prelaunch:
                // After a reset QEMU calls a guest that its migration has stopped one that never ran.
                if state == .prelaunch, guest.verdict != .runs { return nil }
                switch await leavePostmigrate() {
                case .onItsWay: break
                case .asItWas: return nil
                case .held(let why): return why
                }
            // Whoever stopped it, or let it run, meanwhile: it is as they left it.
            default: return nil
            }
            await loop.sleep(for: .milliseconds(10))
        }
        return "QEMU does not answer, or does not leave the state of its migration"
    }

    /// What became of a guest in the state `postmigrate`.
    private enum Departure {
        /// QEMU was told to let it go on.
        case onItsWay
        /// It stands still as it did; only the name of its state is another one.
        case asItWas
        /// It must not go on, for this reason.
        case held(String)
    }

    private func leavePostmigrate() async -> Departure {
        if let displaced = fence?.displaced(), !displaced.isEmpty { return .held(displaced.joined(separator: "; ")) }
        switch guest {
        case .paused, .prelaunch:
            // In one breath: the guest runs for less than a millisecond.
            async let resumed: Void? = try? monitor.resume()
            async let stopped: Void? = try? monitor.pause()
            _ = await (resumed, stopped)
            return .onItsWay
        case .panicked, .watchdog, .shutdown, .internalError:
            say(
                "\(guest.sentence), which its QEMU has forgotten: it stands still in the state 'postmigrate', and 'cont' would revive it"
            )
            return .asItWas
        case .ioError:
            // Of a request that fails again, QEMU's IDE tells the guest instead of keeping it.
            if let drives = try? await monitor.failedDrives(),
                let drive = drives.first(where: { $0.type.hasPrefix("ide-") })
            {
                say(
                    "\(guest.sentence), which its QEMU has forgotten: it stands still in the state 'postmigrate'; "
                        + "'cont' makes the request of drive '\(drive.name)' again, once the cause is gone"
                )
                return .asItWas
            }
            _ = try? await monitor.resume()
            return .onItsWay
        default:
            _ = try? await monitor.resume()
            return .onItsWay
        }
    }
}
