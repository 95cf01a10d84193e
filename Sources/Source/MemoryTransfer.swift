internal import Emulator
internal import IO
internal import Migration

/// The guest's memory on its way: QEMU's migration, the relay of its stream, and what QEMU is told so that it converges.
///
/// Confined to the control loop.
final class MemoryTransfer: @unchecked Sendable {
    // Unchecked: confined to the control loop.
    private static let attemptsLimit = 20
    /// The round trip of a line that one connection does not fill, in milliseconds.
    private static let longLine = 2.0

    private let context: MigrationContext
    private let link: DestinationLink
    private let mirrors: DiskMirrors
    private var plan: MigrationPlan { context.plan }
    private(set) var stream: OutgoingStream?
    /// How often the memory was sent in vain.
    private var attempt = 0
    /// Bytes of the streams of these attempts, as QEMU made them and on the line.
    private var earlier = (sent: UInt64(0), onLine: UInt64(0))
    /// Bytes of QEMU's streams that were sent, in all attempts.
    var bytesSent: UInt64 { earlier.sent + (stream?.bytesSent ?? 0) }
    /// What they were on the line; nil when the last ones could not be compressed.
    var bytesOnLine: UInt64? { stream?.bytesOnLine.map { earlier.onLine + $0 } }
    private var attemptBegan: ContinuousClock.Instant?
    /// When it did not get through for the first time.
    private var troubleBegan: ContinuousClock.Instant?
    private var enabledCapabilities: [String] = []
    /// Finds out how fast the guest changes its memory, where that decides something.
    private var watching: Task<Double?, any Error>?
    private var earlierParameters: [String: JSONValue] = [:]

    init(_ context: MigrationContext, _ link: DestinationLink, _ mirrors: DiskMirrors) {
        self.context = context
        self.link = link
        self.mirrors = mirrors
    }

    /// How much of the memory may be left, in seconds, when the copies of others begin to yield; for how many looks they do so at most, and
    /// for how long after each, in milliseconds.
    private static let (lastSeconds, mostYields, yielding) = (1.5, 50, 1000)

    /// That a pause is near is said when so much of the memory is left, in seconds, a few times in an attempt at most, and not one right after the
    /// other: who is told holds back what people type.
    private struct Announcements {
        private static let (soon, most, distance) = (0.7, 3, Duration.seconds(2))
        private var count = 0
        private var latest: ContinuousClock.Instant?

        /// Whether it is to be said now.
        mutating func areDue(in seconds: Double, at now: ContinuousClock.Instant) -> Bool {
            guard seconds <= Self.soon, count < Self.most, latest.map({ now - $0 > Self.distance }) ?? true else {
                return false
            }
            (count, latest) = (count + 1, now)
            return true
        }
    }
    private var announcements = Announcements()

    // MARK: before the first attempt

    /// Bytes a second that the line carries, as far as they may be used; 0 when nothing was measured.
    private var lineRate: Double {
        let rate = context.report.rehearsal?.bytesPerSecond ?? 0
        return plan.bandwidth > 0 ? min(rate, Double(plan.bandwidth)) : rate
    }

    /// Is called before QEMU may pause the guest because the memory would fit, and each time anew.
    var beforePause: (() async -> Void)?

    /// Begins to watch the guest where it may be of use to know how fast it changes its memory, while the disks are copied.
    func watch(_ monitor: QMPClient) {
        guard watching == nil, lineRate > 0, lineRate <= DeltaCache.fastLine else { return }
        watching = Task(executorPreference: context.loop) { [context] in
            try await DirtyRate.measure(monitor, context)
        }
    }

    /// Bytes a second that the disks were copied with, when enough of them was copied to tell: what was measured before, with little, is more
    /// than a line lets through for long.
    private var copyRate: Double {
        guard let copied = context.report.copiedBytes, copied >= Self.tellingCopy,
            let time = context.report.phasesMS["disks"], time > 0
        else { return .infinity }
        return Double(copied) / time * 1000
    }
    private static let tellingCopy: UInt64 = 8 << 20

    /// How long a guest's memory takes at least for which it is waited until it was watched.
    private static let longMemory = 5.0

    /// What QEMU gets to remember pages; nil when pages are sent whole.
    private func deltaCache(_ memory: UInt64) async throws -> DeltaCache? {
        guard let watching else { return nil }
        if context.report.phasesMS["disks"] ?? 0 < 2000, Double(memory) < lineRate * Self.longMemory {
            watching.cancel()
            context.wake()
        }
        guard let rate = try? await watching.value else {
            try context.check()
            return nil
        }
        return DeltaCache(dirtyRate: rate, lineRate: min(lineRate, copyRate), memory: memory)
    }

    // MARK: an attempt

    /// Sends the memory until QEMU waits at pre-switchover.
    ///
    /// - Parameter begin: is called right before QEMU may pause the guest.
    func send(_ monitor: QMPClient, _ watch: GuestWatch, _ record: GuestRecord, begin: () throws -> Void) async throws {
        attemptBegan = .now
        let attempt = attempt
        let socket = context.files.streamSocket(attempt: attempt)
        let answer = try await link.ask(.stream, timeout: .seconds(30))
        guard case .stream = answer else { throw link.unexpected(answer, to: .stream) }
        let stream = try await OutgoingStream.start(
            socket: socket,
            plan: plan,
            credentials: context.credentials,
            client: record.process?.pid,
            lanes: lanes,
            on: context.dataLoops.next()
        ) { [weak self] reason in
            guard let self else { return }
            self.context.loop.execute { self.streamEnded(monitor, reason, attempt) }
        }
        self.stream = stream
        try await prepare(monitor, record)
        watch.isMigrating = true
        try begin()
        try await monitor.migrate(toSocket: socket)
        try await follow(monitor, watch)
    }

    /// On a long line a connection carries what it may have under way per round trip, so several share the stream. On a short one, one
    /// carries what QEMU can send, and more would only cost; it does so in pieces where these may be compressed. The disks have found out how many are worth it.
    private var lanes: OutgoingStream.Lanes? {
        guard link.features.contains(.lanes) else { return nil }
        let isLong = (context.report.rehearsal?.roundTripMS ?? 0) >= Self.longLine
        let compression = compression
        guard isLong || compression != .off else { return nil }
        let most = max(plan.firstConnections, mirrors.mostConnections)
        let count = isLong ? min(most, StreamPiece.mostLanes) : 1
        return .init(
            attempt: attempt,
            count: count,
            compression: compression,
            lineRate: measuredRate,
            seen: seen,
            isAcknowledged: link.features.contains(.acknowledgedPieces),
            loops: context.dataLoops
        )
    }

    /// A line on which compressing would always lose is not even tried.
    private var compression: Compression {
        guard link.features.contains(.compressedPieces) else { return .off }
        return plan.compression == .auto && measuredRate > CompressionChoice.fastLine ? .off : plan.compression
    }

    /// What the disks have just seen of the line. A slow one is seen soon enough, and what of the disks was compressed is not known of the memory.
    private var seen: (rate: Double, roundTrip: Duration)? {
        guard copyRate.isFinite, copyRate > CompressionChoice.slowLine, let rehearsal = context.report.rehearsal else {
            return nil
        }
        return (copyRate, .seconds(rehearsal.roundTripMS / 1000))
    }

    /// Bytes a second that the line was measured to take. The disks' copy counts where it was slow: what a rehearsal sends may be less than what a line lets through
    /// at once after it was idle.
    private var measuredRate: Double {
        let rate = context.report.rehearsal?.bytesPerSecond ?? 0
        return copyRate <= CompressionChoice.slowLine ? min(rate, copyRate) : rate
    }

    private func prepare(_ monitor: QMPClient, _ record: GuestRecord) async throws {
        var capabilities = ["events", "return-path", "pause-before-switchover", "auto-converge"]
        if record.commandLine.has("uuid") { capabilities.append("validate-uuid") }
        let cache = try await deltaCache(try await monitor.baseMemory())
        if cache != nil { capabilities.append("xbzrle") }
        try await monitor.setCapabilities(capabilities, to: true)
        enabledCapabilities = capabilities
        let changed: Set = [
            "max-bandwidth", "downtime-limit", "throttle-trigger-threshold", "cpu-throttle-initial",
            "cpu-throttle-increment", "max-cpu-throttle", "xbzrle-cache-size",
        ]
        if earlierParameters.isEmpty {
            let earlier = try await monitor.execute("query-migrate-parameters").object
            earlierParameters = earlier.filter { changed.contains($0.key) }
        }
        // The downtime limit is the gate: QEMU does not pause the guest while the disks have too much to send. The
        // throttle is kept from working until the rounds show that it is needed.
        try await monitor.setMigrationParameters([
            "max-bandwidth": .integer(Int64(plannedSpeed)),
            "downtime-limit": 1,
            "throttle-trigger-threshold": 100,
            "cpu-throttle-initial": 1,
            "cpu-throttle-increment": 1,
            "max-cpu-throttle": 1,
        ])
        guard let cache else { return }
        try await monitor.setMigrationParameters(["xbzrle-cache-size": .integer(Int64(cache.bytes))])
        context.report.deltaCacheBytes = cache.bytes
    }

    /// Why QEMU's stream broke in this attempt, as far as its carrier knows.
    private var streamReason: String?
    /// For how long that is waited for, in milliseconds, after QEMU has said that it failed.
    private static let reasonTime = 200

    /// Whether QEMU has said so in this attempt, and what of it.
    private var hasFailed = false
    private var emulatorReason: String?
    private var failureReason: String {
        streamReason ?? "QEMU could not send the memory\(emulatorReason.map { ": \($0)" } ?? "")"
    }

    /// QEMU has failed. It knows that its stream broke; why, its carrier knows, or is about to. A guest that is paused does not wait for that.
    func loseInQEMU(_ watch: GuestWatch, _ error: String?) {
        if let error { emulatorReason = error }
        if streamReason != nil || watch.isAtSwitchover || watch.stoppedAt != nil { return lose(failureReason) }
        guard !hasFailed else { return }
        hasFailed = true
        let attempt = attempt
        _ = context.loop.schedule(after: .milliseconds(Self.reasonTime)) {
            if attempt == self.attempt { self.lose(self.failureReason) }
        }
    }

    /// A stream that breaks after QEMU has finished is how streams end.
    private func streamEnded(_ monitor: QMPClient, _ reason: String, _ attempt: Int) {
        if attempt == self.attempt, streamReason == nil { streamReason = reason }
        Task(executorPreference: context.loop) {
            if let state = try? await monitor.migrationState(), state.status == "completed" { return }
            if attempt == self.attempt { self.lose(reason) }
        }
    }

    /// The memory did not get through. As long as the mirrors are whole it is sent again, from its start.
    ///
    /// - Parameter progressed: when the attempt has last brought something to the destination; nil for now.
    func lose(_ reason: String, progressed: ContinuousClock.Instant? = nil) {
        // An attempt that went well for long has nothing to do with the trouble before it.
        if let attemptBegan, (progressed ?? .now) - attemptBegan > .seconds(plan.patience) { troubleBegan = nil }
        let trouble = troubleBegan ?? .now
        troubleBegan = trouble
        // A stream that breaks again and again while the destination answers is bounded as an outage is.
        let isOver = attempt >= 2 && ContinuousClock.now - trouble > .seconds(plan.patience)
        guard mirrors.areWhole, attempt < Self.attemptsLimit, !isOver else {
            return context.fail(MigrationError(.failed, reason))
        }
        context.loseMemory(reason)
    }

    /// For how many seconds the destination may take no memory: QEMUs on busy hosts take a while to begin.
    private var stillness: Int { max(plan.patience, 5) }

    private func follow(_ monitor: QMPClient, _ watch: GuestWatch) async throws {
        let hasFewPasses = try await monitor.losesWritesOfMovingGuests()
        var pacing = MemoryPacing(mostSlowDown: plan.mostSlowDown, hasFewPasses: hasFewPasses)
        var disksMeter = RateMeter()
        var diskConvergence = Convergence()
        var (sent, processed) = (RateMeter(), RateMeter())
        var yield = DeltaYield()
        var yielded = 0
        var progress = (bytes: UInt64(0), at: ContinuousClock.now)
        while !watch.isAtSwitchover {
            let state = try await monitor.migrationState()
            if state.transferred != progress.bytes || mirrors.isAway {
                progress = (state.transferred, .now)
            } else if ContinuousClock.now - progress.at > .seconds(stillness) {
                lose(
                    "\(plan.host) has taken no memory for \(stillness) s: see there whether its QEMU stands still",
                    progressed: progress.at
                )
            }
            if state.status == "failed" || state.status == "cancelled" {
                loseInQEMU(watch, state.error ?? state.status)
            }
            try context.check()
            try await mirrors.refreshJobs(monitor)
            disksMeter.add(mirrors.dataBytes)
            let disksFit = mirrors.fits(max(disksMeter.peak, mirrors.rate))
            if disksFit || mirrors.isAway {
                diskConvergence.reset()
            } else if diskConvergence.hasFailed(remaining: mirrors.remaining, rate: disksMeter.rate) {
                throw mirrors.notConverged("disks", mirrors.remaining, disksMeter.rate)
            }
            let percent = state.total == 0 ? 0 : 100 * (1 - Double(state.remaining) / Double(state.total))
            // Empty pages count as memory and cost nothing.
            sent.add(state.transferred)
            processed.add(state.processed)
            if context.report.deltaCacheBytes != nil { yield.add(state) }
            let seconds = processed.shown > 0 ? Double(state.remaining) / processed.shown : nil
            var shown = state
            // In its first pass QEMU repeats what it was told to keep to.
            if state.rounds < 2 { shown.expectedPauseMS = nil }
            context.progress(percent: percent, rate: sent.shown, remaining: seconds, memory: shown)
            let look = MemoryPacing.Look(
                remaining: state.remaining,
                rounds: state.rounds,
                rate: state.megabitsPerSecond * 1e6 / 8,
                steadyRate: sent.rate,
                yield: yield.share,
                dirtyRate: state.dirtyRate ?? 0,
                disks: mirrors.remaining,
                disksFit: disksFit,
                isAway: mirrors.isAway
            )
            let orders = pacing.take(look)
            if pacing.gateIsOpen, let beforePause, announcements.areDue(in: seconds ?? 0, at: .now) {
                await beforePause()
            }
            for order in orders { try await carryOut(order, look, monitor) }
            // What the copies of others have under way would be before everything that the pause waits for. The line has the memory to carry.
            if let seconds, pacing.gateIsOpen, seconds <= Self.lastSeconds, yielded < Self.mostYields {
                yielded += 1
                context.beacon?.raise(for: Self.yielding)
            }
            // The event may have come while QEMU was asked; the guest is paused then, so there is nothing to wait for.
            if !watch.isAtSwitchover { try await context.wait(.milliseconds(100)) }
        }
    }

    private func carryOut(_ order: MemoryPacing.Order, _ look: MemoryPacing.Look, _ monitor: QMPClient) async throws {
        switch order {
        case .gate(let share):
            let limit = max(Int(Double(plan.downtimeLimit) * share), 1)
            try await monitor.setMigrationParameters(["downtime-limit": .integer(Int64(limit))])
        case .speed(let limit):
            let speed = min(limit ?? .max, plannedSpeed)
            try await monitor.setMigrationParameters(["max-bandwidth": .integer(Int64(speed))])
        case .slowDown(let percent):
            context.warn(
                "The guest writes its memory faster than it can be sent (\(Self.text(look.dirtyRate)) against \(Self.text(look.memoryRate))); slowing "
                    + "the guest down"
            )
            try await monitor.setMigrationParameters([
                "max-cpu-throttle": .integer(Int64(plan.mostSlowDown)),
                "cpu-throttle-initial": .integer(Int64(percent)),
                "cpu-throttle-increment": 10, "throttle-trigger-threshold": 25,
            ])
        case .giveUp:
            throw mirrors.notConverged("memory", look.remaining, look.memoryRate, writes: look.dirtyRate)
        }
    }

    private static func text(_ rate: Double) -> String { "\(MigrationContext.megabytes(rate))/s" }

    /// Bytes a second of memory that the plan allows.
    private var plannedSpeed: UInt64 { plan.bandwidth == 0 ? 1 << 40 : plan.bandwidth }

    // MARK: between attempts

    /// The guest goes on as if nothing had been tried, and the disks are still mirrored.
    func prepareRetry(_ monitor: QMPClient, _ watch: GuestWatch, _ reason: String) async throws {
        attempt += 1
        (hasFailed, streamReason, emulatorReason) = (false, nil, nil)
        announcements = Announcements()
        if let stream {
            stream.abort(reason)
            earlier.sent += stream.bytesSent
            earlier.onLine += stream.bytesOnLine ?? stream.bytesSent
            self.stream = nil
        }
        // Before that QEMU reports how the guest came to this host.
        if watch.isMigrating {
            let restoration = GuestRestoration(monitor: monitor, guest: watch.guest)
            if let problem = await restoration.endAttempt() { throw MigrationError(.failed, "\(reason); \(problem)") }
        }
        watch.reset()
        context.forgetMemoryLoss()
    }

    /// Waits until it makes sense to try again.
    func waitForRetry() async throws {
        let pause = Duration.milliseconds(200 << min(attempt, 5))
        let end = ContinuousClock.now + pause
        var told = ContinuousClock.now - Self.news
        while ContinuousClock.now < end || link.isReconnecting {
            // Who looks sees that nothing moves.
            if ContinuousClock.now - told >= Self.news {
                context.progress(percent: 0, rate: 0, remaining: nil)
                told = .now
            }
            try await context.wait(ContinuousClock.now < end ? min(end - .now, Self.news) : Self.news)
        }
        _ = try await link.connection()
    }
    private static let news = Duration.seconds(1)

    // MARK: the end

    /// Has QEMU send the rest.
    func proceed(_ monitor: QMPClient) async throws { try await monitor.continueMigration() }

    /// Waits until QEMU has completed the migration and says so in its run state.
    func complete(_ monitor: QMPClient) async throws {
        while true {
            // Completed means that the destination has said so on the return path; nothing else does.
            let state = try await monitor.migrationState()
            if state.status == "completed" { break }
            if state.status == "failed" || state.status == "cancelled" {
                let reason = streamReason ?? state.error ?? state.status
                throw MigrationError(.failed, "QEMU could not finish the migration: \(reason)")
            }
            try await context.wait(.milliseconds(5))
        }
        // The run state follows a moment after the migration's state.
        while true {
            let state = try await monitor.runState()
            if state == .postmigrate { break }
            guard state == .finishMigrate || state == .paused else {
                throw MigrationError(
                    .failed,
                    "QEMU is in the state '\(state.rawValue)' after the migration, not 'postmigrate'"
                )
            }
            try await context.wait(.milliseconds(2))
        }
    }

    /// Other tools that use this QEMU must find what they are used to.
    func forgetSettings(_ monitor: QMPClient) async {
        if !enabledCapabilities.isEmpty { try? await monitor.setCapabilities(enabledCapabilities, to: false) }
        if !earlierParameters.isEmpty { try? await monitor.setMigrationParameters(earlierParameters) }
    }

    func abort(_ reason: String) {
        watching?.cancel()
        stream?.abort(reason)
    }
}
