internal import Emulator
internal import FoundationEssentials
internal import IO
internal import Migration

/// A blank copy of the guest moves before anything of the guest does, and is compared; and what is measured on the way.
///
/// Confined to the control loop.
final class Rehearsal: @unchecked Sendable {
    // Unchecked: confined to the control loop.
    private let context: MigrationContext
    private let link: DestinationLink
    private let monitor: QMPClient
    private let inspection: GuestInspection
    private let process: EmulatorProcess?
    private let known: RehearsedFigures
    private let turn: KeyedSemaphore.Permit?
    private var watching: Task<Activity?, any Error>?
    private var plan: MigrationPlan { context.plan }
    /// The blank copy, from the moment when it is started until it is stopped.
    private var shadow: Task<ShadowEmulator, any Error>?
    /// The destination's part of what proofs of lineage are bound to.
    private(set) var seedNonce: String?
    /// What a blank copy said last before it ended.
    private var shadowWords: String?

    init(
        _ context: MigrationContext,
        _ link: DestinationLink,
        _ monitor: QMPClient,
        _ inspection: GuestInspection,
        _ process: EmulatorProcess?,
        _ known: RehearsedFigures,
        turn: KeyedSemaphore.Permit?
    ) {
        self.known = known
        self.turn = turn
        self.process = process
        self.context = context
        self.link = link
        self.monitor = monitor
        self.inspection = inspection
    }

    /// Begins to watch the guest when that is wanted, waits until blank copies may be started, and starts the one of this host: the other one
    /// is asked for meanwhile.
    func begin() async throws {
        if plan.isRehearsal { watching = Task(executorPreference: context.loop) { try await self.activity() } }
        try await turn?.wait()
        try context.checkFault()
        shadow = Task(executorPreference: context.loop) { [context, inspection] in
            try await ShadowEmulator.start(
                inspection.commandLine,
                .init(sizes: inspection.sizes, memory: inspection.memory, memoryID: inspection.memoryID),
                isIncoming: false,
                isWanted: { !Task.isCancelled },
                on: context.loop
            )
        }
    }

    /// Ends what is still there of it.
    func end() async {
        watching?.cancel()
        context.wake()
        _ = await watching?.result
        await stopShadow()
    }

    private func stopShadow() async {
        guard let shadow else { return }
        self.shadow = nil
        shadow.cancel()
        try? await shadow.value.stop()
    }

    /// Begins to measure the way to the destination.
    func probe() async throws -> LinkMeasure.Probe {
        if let line = known.line { return LinkMeasure.Probe(line) }
        return try await LinkMeasure.begin(over: link.connection(), isThorough: plan.isRehearsal)
    }

    /// Moves a blank copy of the guest before anything of the guest moves.
    ///
    /// - Throws: `MigrationError` with every reason why the move would not work.
    ///
    /// - Returns: the digests of the images under disks that the destination has as well.
    func rehearse(_ offer: Message.Offer, _ probe: LinkMeasure.Probe) async throws -> Message.Rehearsed {
        let control = try await link.connection()
        let began = ContinuousClock.now
        let here = try await MachineFingerprint(of: monitor)
        // What it will take to send the copy there is made ready meanwhile.
        let dialled = DialledStream(plan, credentials: context.credentials, on: context.dataLoops.next())
        var isUsed = false
        defer { if !isUsed { dialled.giveUp() } }
        let measure = try await probe.measure()
        let answer = try await control.next(timeout: .seconds(180))
        guard case .shadow(let there) = answer else {
            _ = try GuestOffering.readiness(answer, plan)
            throw MigrationError(.failed, "The destination answered OFFER with \(answer.name)")
        }
        seedNonce = there.seedNonce
        let skew = Date.now.timeIntervalSince1970 * 1000 - Double(there.clock) - measure.roundTrip / 2
        let processor = Set(here.processorDifferences(from: there.fingerprint))
        var obstacles = here.differences(from: there.fingerprint).map { reason in
            Obstacle(processor.contains(reason) ? .processor : .machine, reason)
        }
        var bytes = UInt64(LinkMeasure.bytes)
        do {
            isUsed = true
            bytes += try await moveShadow(dialled)
        } catch let error as GuestError {
            obstacles.append(.init(.machine, error.message))
        } catch let error as QMPError {
            obstacles.append(
                .init(.machine, "A blank copy of the guest ended on this host: \(shadowWords ?? error.message)")
            )
        }
        var digests: [String: String] = [:]
        if !plan.isRehearsal {
            for path in there.backing where offer.disks.contains(where: { $0.backing.contains { $0.path == path } }) {
                digests[path] = try await BlockingPool.shared.run { try ChunkDigests.digest(of: path) }
            }
        }
        for warning in there.warnings.prefix(20) { context.warn(MigrationContext.said(warning)) }
        if inspection.status == "running", try await monitor.losesWritesOfMovingGuests() {
            context.warn(
                "QEMU \(inspection.emulatorVersion) emulates this guest's processor, and loses some of what such a guest writes to its memory "
                    + "during a move: it may crash afterwards. KVM, and QEMU from 9.0 on, do not, nor does a paused guest"
            )
        }
        if abs(skew) > 5000 {
            context.warn(
                "The clocks of the two hosts differ by \(Int(min(abs(skew) / 1000, 1e12))) s; the guest would notice, and so do certificates"
            )
        }
        let rehearsed = Message.Rehearsed(backing: digests)
        if obstacles.isEmpty, plan.isRehearsal {
            try await control.send(.rehearsed(rehearsed))
            _ = try GuestOffering.readiness(try await control.next(timeout: .seconds(180)), plan)
        }
        var rehearsal = MigrationReport.Rehearsal()
        rehearsal.milliseconds = MigrationContext.milliseconds(ContinuousClock.now - began)
        rehearsal.bytes = bytes
        rehearsal.roundTripMS = measure.roundTrip
        rehearsal.bytesPerSecond = measure.rate
        rehearsal.changes = inspection.changes + there.changes.prefix(1000).map(MigrationContext.said)
        rehearsal.emulatorHere = inspection.emulatorVersion
        rehearsal.emulatorThere = there.emulatorVersion
        rehearsal.clockSkewMS = skew
        rehearsal.freeBytes = there.free
        // Nothing is left that takes anything of either host.
        turn?.end()
        if let activity = try await watching?.value { estimate(offer, measure, activity, &rehearsal) }
        context.report.rehearsal = rehearsal
        guard obstacles.isEmpty else {
            // What QEMU said there tells more than that the stream ended here.
            throw GuestOffering.refusal(obstacles, plan)
        }
        return rehearsed
    }

    /// Sends a blank copy from here to the one that waits at the destination.
    ///
    /// - Returns: the bytes that it took.
    /// - Throws: `GuestError` when the copy was not started here, or is not taken there.
    private func moveShadow(_ dialled: DialledStream) async throws -> UInt64 {
        guard let starting = self.shadow else { throw GuestError("No blank copy of the guest was started") }
        let shadow = try await starting.value
        do {
            let stream = try await OutgoingStream.start(
                socket: shadow.outgoingSocket,
                plan: plan,
                credentials: context.credentials,
                client: shadow.pid,
                dialled: dialled,
                on: dialled.loop
            ) { _ in }
            defer { stream.abort("The rehearsal is over") }
            try await shadow.monitor.setMigrationParameters([
                "max-bandwidth": .integer(1 << 40), "downtime-limit": 10_000,
            ])
            try await shadow.monitor.migrate(toSocket: shadow.outgoingSocket)
            let end = ContinuousClock.now + ShadowEmulator.patience
            while true {
                let state = try await shadow.monitor.migrationState(timeout: ShadowEmulator.patience)
                if state.status == "completed" { break }
                if state.status == "failed" || state.status == "cancelled" {
                    throw try await shadowRefused(state.error)
                }
                guard ContinuousClock.now < end else {
                    throw GuestError(
                        "A blank copy of the guest did not get through to the destination within \(ShadowEmulator.patience): look at "
                            + "the link, and for load on both hosts"
                    )
                }
                try await context.wait(.milliseconds(5))
            }
            await stopShadow()
            return stream.bytesSent
        } catch {
            shadowWords = shadow.words.isEmpty ? nil : shadow.words
            await stopShadow()
            throw error
        }
    }

    /// The destination knows why its blank copy did not take the stream.
    private func shadowRefused(_ error: String?) async throws -> GuestError {
        let here = error ?? "the connection broke"
        let control = try await link.connection()
        try await control.send(.rehearsed(.init()))
        if case .ready(let ready) = try await control.next(timeout: .seconds(90)), !ready.reasons.isEmpty {
            return GuestError(ready.reasons.joined(separator: "; "))
        }
        return GuestError("A blank copy of the guest could not be moved: \(here)")
    }

    // MARK: how long it will take

    /// What a move takes that copies nothing, without its rehearsal, in seconds: a QEMU there, verification, the switchover.
    private static let steps = 1.0

    private typealias Activity = RehearsedFigures.Activity

    /// What the guest does to its memory and disks: it is watched for a second (`calc-dirty-rate`, `query-blockstats`).
    private func activity() async throws -> Activity? {
        if let activity = known.activity { return activity }
        func written() async throws -> Double {
            try await monitor.execute("query-blockstats").array.reduce(0) {
                $0 + Double($1["stats"]?["wr_bytes"]?.integer ?? 0)
            }
        }
        let start = ContinuousClock.now
        let before = try await written()
        var activity = Activity()
        activity.memory = try await DirtyRate.measure(monitor, context) ?? 0
        let seconds = MigrationContext.milliseconds(ContinuousClock.now - start) / 1000
        activity.disks = try await max(written() - before, 0) / seconds
        return activity
    }

    private func estimate(
        _ offer: Message.Offer,
        _ measure: LinkMeasure,
        _ activity: Activity,
        _ rehearsal: inout MigrationReport.Rehearsal
    ) {
        let limit = plan.bandwidth > 0 ? Double(plan.bandwidth) : .infinity
        let rate = min(measure.rate, limit)
        let disks = offer.disks.reduce(0) { $0 + Double($1.allocated) }
        rehearsal.memoryDirtyRate = activity.memory
        rehearsal.diskWriteRate = activity.disks
        rehearsal.diskBytes = UInt64(disks)
        rehearsal.diskBytesAtMost = offer.disks.reduce(0) { $0 + $1.size }
        rehearsal.memoryBytes = offer.memory
        rehearsal.memoryBytesInUse = process?.residentMemory.map { min($0, offer.memory) }
        let memory = Double(rehearsal.memoryBytesInUse ?? offer.memory)
        func time(_ bytes: Double, _ growth: Double) -> Double? {
            growth >= rate * 0.95 ? nil : bytes / (rate - growth)
        }
        let (first, second) = (time(disks, activity.disks), time(memory, activity.memory))
        let carried = "one connection to \(plan.host) carried in the rehearsal (\(MigrationContext.megabytes(rate))/s)"
        if first == nil {
            context.warn(
                "The guest writes its disks (\(MigrationContext.megabytes(activity.disks))/s) faster than \(carried); unless more connections "
                    + "or compression carry more, the move will not converge: that needs a faster line or a calmer guest"
            )
        }
        if second == nil {
            context.warn(
                "The guest writes its memory (\(MigrationContext.megabytes(activity.memory))/s) faster than \(carried); it may not converge without "
                    + "being slowed down"
            )
        }
        guard let first, let second else { return }
        // The move begins with a rehearsal, too, and has its own steps besides the copies.
        rehearsal.secondsEstimated = first + second + rehearsal.milliseconds / 1000 + Self.steps
    }
}
