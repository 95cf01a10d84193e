internal import Emulator
internal import IO
internal import Migration

/// The destination decides what becomes of the guest.
extension OutgoingMigration {
    func abandon(_ reason: String) async -> SourceHandover.Event {
        link.shield()
        while true {
            context.warn(
                "Whether guest '\(plan.guest)' was released could not be made durable. It stays paused until \(plan.host) "
                    + "has given it up"
            )
            switch await link.tell(reason, patience: .seconds(30)) {
            case .acknowledged: return .abandoned
            case .overruled(let by): return .overruled(by: by)
            case .silent: await context.loop.sleep(for: .seconds(1))
            }
        }
    }

    func release(_ pause: SourceHandover.Pause) async -> SourceHandover.Event {
        deadline?.cancel()
        link.shield()
        context.enter("release")
        await fenceAgain()
        // A full comparison reads all that the destination has.
        let patience = 30 + (fullDigests.isEmpty ? 0 : Int(mirrors.disks.reduce(0) { $0 + $1.offer.size } >> 26))
        var release = Message.Release(
            digests: fullDigests,
            runState: link.features.contains(.runState) || pause.guest != .running ? pause.guest : nil
        )
        release.lineages = lineages
        if record?.isOff == true, pause.guest == .prelaunch { release.isOff = true }
        var silence = Silence()
        let answer = await link.release(release, patience: .seconds(patience)) { error in
            if let words = silence.words("\(error)", plan) { context.warn(words) }
        }
        guard case .owned(let owned) = answer else {
            if case .refused(let reason) = answer { return .refused(reason) }
            return .refused("it answered RELEASE with \(answer.name)")
        }
        if let since = pause.since {
            let time = MigrationContext.milliseconds(ContinuousClock.now - since)
            context.report.blackoutMS = max(0, time - max(0, owned.sinceResumed ?? 0))
        }
        turn = nil
        context.beacon?.lower()
        context.report.outcome = .migrated
        if pause.guest != .running { context.report.guestState = pause.guest }
        context.report.isOff = release.isOff
        for (index, disk) in mirrors.disks.enumerated() where index < context.report.disks.count {
            context.report.disks[index].digestDestination = owned.digests[disk.offer.name]
        }
        do { try await journal?.write(.confirmed) } catch { context.warn("\(error)") }
        context.enter("done")
        if let sentence = lateness(running: owned.sinceResumed ?? 0) { context.warn(sentence) }
        return .owned
    }

    /// That the pause was longer than it was to be, and what took its time; nil when it was not.
    ///
    /// - Parameter running: for how many milliseconds the guest ran already when its new host said so.
    private func lateness(running: Double) -> String? {
        guard let blackout = context.report.blackoutMS, blackout > Double(plan.downtimeLimit) else { return nil }
        let phases = context.report.phasesMS
        let (switchover, release) = (phases["switchover"] ?? 0, max(0, (phases["release"] ?? 0) - max(0, running)))
        func text(_ time: Double) -> String { "\(Int(max(0, time).rounded())) ms" }
        let full = plan.verifiesFully ? ", reading both images from end to end among it (--verify=full)" : ""
        return
            "The guest was paused for \(text(blackout)), longer than the \(plan.downtimeLimit) ms of --downtime-limit: QEMU's stop and the "
            + "last of the memory took \(text(blackout - switchover - release)), the last of the disks and the comparison "
            + "\(text(switchover))\(full), the handing over \(text(release))"
    }

    /// A destination that does not say whether it has the guest.
    private struct Silence {
        /// What concerns only who is left alone for so long.
        private static let long = Duration.seconds(30)
        private let began = ContinuousClock.now
        private var last: (reason: String, at: ContinuousClock.Instant)?
        private var hasAdvised = false

        /// What the operator is told; nil for what was said a moment ago.
        mutating func words(_ reason: String, _ plan: MigrationPlan) -> String? {
            let now = ContinuousClock.now
            let isLong = now - began > Self.long
            if let last, last.reason == reason, now - last.at < .seconds(60), hasAdvised || !isLong { return nil }
            last = (reason, now)
            hasAdvised = isLong
            let words =
                "Guest '\(plan.guest)' was released to \(plan.host), which has not confirmed yet: \(reason). It must not be started here; "
                + "trying again"
            return isLong
                ? words
                    + ". If \(plan.host) is gone for good, 'crossdock recover \(plan.id) --take-ownership' says what can be done"
                : words
        }
    }

    /// Ends the old QEMU and compares the images.
    func finish() async -> SourceHandover.Event {
        // Before this host's agent lets go of the console.
        await handOverConsoles()
        rememberRelease()
        await tellConsoles()
        if let control = link.control { _ = try? await control.ask(.done, timeout: .seconds(10)) }
        await endEmulator()
        for (index, disk) in mirrors.disks.enumerated() where index < context.report.disks.count {
            await compare(disk, index)
            await disk.relay?.close()
        }
        offerSeeds()
        // Nothing is kept for no time at all until somebody looks again.
        if plan.keepSource == 0 { FencedImages.purge(context.migrations, only: plan.id) }
        return .finished
    }

    func compare(_ disk: SourceDisk, _ index: Int) async {
        let path = whereabouts(of: disk.path)
        let digest = await disk.digest(at: path, data: disk.dataPath.map(whereabouts), on: context.dataLoops)
        context.report.disks[index].digestSource = digest
        let there = context.report.disks[index].digestDestination
        if disk.isSealed {
            context.warn(
                "The digests of \(disk.offer.name) could not be compared: its secret is not known any more"
            )
        } else if digest != nil, there == nil, disk.isProved {
            // It had compared every chunk before it took the guest; only what the report shows has died with its agent.
            context.warn(
                "The digest of \(disk.offer.name) on \(plan.host) is not known: the agent there ended right after it had taken the guest. "
                    + "It had compared all chunks of the disk before"
            )
        } else if digest == nil || digest != there {
            context.report.code = MigrationError.Code.mismatch.rawValue
            let what =
                digest == nil || there == nil
                ? "could not be compared" : "differ: the guest has another disk there than it had here"
            context.report.reason =
                "The digests of \(disk.offer.name) \(what). The guest is on \(plan.host); the old image is kept as \(path)"
            FencedImages.keepForever(plan.id, context.migrations)
        }
    }
}
