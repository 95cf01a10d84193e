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
    private static let patienceWithThrottle = 12

    private let context: MigrationContext
    private let link: DestinationLink
    private let mirrors: DiskMirrors
    private var plan: MigrationPlan { context.plan }
    private(set) var stream: OutgoingStream?
    /// How often the memory was sent in vain.
    private var attempt = 0
    private var attemptBegan: ContinuousClock.Instant?
    /// When it did not get through for the first time.
    private var troubleBegan: ContinuousClock.Instant?
    private var enabledCapabilities: [String] = []
    private var earlierParameters: [String: JSONValue] = [:]

    init(_ context: MigrationContext, _ link: DestinationLink, _ mirrors: DiskMirrors) {
        self.context = context
        self.link = link
        self.mirrors = mirrors
    }

    /// How much of the memory may be left, in seconds, when the copies of others begin to yield; for how many looks they do so at most, and
    /// for how long after each, in milliseconds.
    private static let (lastSeconds, mostYields, yielding) = (1.5, 50, 1000)

    // MARK: an attempt

    /// Sends the memory until QEMU waits at pre-switchover.
    ///
    /// - Parameter begin: is called right before QEMU may pause the guest.
    func send(_ monitor: QMPClient, _ watch: GuestWatch, _ record: GuestRecord, begin: () throws -> Void) async throws {
        attemptBegan = .now
        let attempt = attempt
        let socket = context.files.streamSocket(attempt: attempt)
        guard case .stream = try await link.ask(.stream, timeout: .seconds(30)) else {
            throw MigrationError(.failed, "The destination does not wait for the memory")
        }
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
            lineRate: context.report.rehearsal?.bytesPerSecond,
            loops: context.dataLoops
        )
    }

    /// A line on which compressing would always lose is not even tried.
    private var compression: Compression {
        guard link.features.contains(.compressedPieces) else { return .off }
        let rate = context.report.rehearsal?.bytesPerSecond ?? 0
        return plan.compression == .auto && rate > CompressionChoice.fastLine ? .off : plan.compression
    }

    private func prepare(_ monitor: QMPClient, _ record: GuestRecord) async throws {
        var capabilities = ["events", "return-path", "pause-before-switchover", "auto-converge"]
        if record.commandLine.has("uuid") { capabilities.append("validate-uuid") }
        try await monitor.setCapabilities(capabilities, to: true)
        enabledCapabilities = capabilities
        let changed: Set = [
            "max-bandwidth", "downtime-limit", "throttle-trigger-threshold", "cpu-throttle-initial",
            "cpu-throttle-increment", "max-cpu-throttle",
        ]
        if earlierParameters.isEmpty {
            let earlier = try await monitor.execute("query-migrate-parameters").object
            earlierParameters = earlier.filter { changed.contains($0.key) }
        }
        // The downtime limit is the gate: QEMU does not pause the guest while the disks have too much to send. The
        // throttle is kept from working until the rounds show that it is needed.
        try await monitor.setMigrationParameters([
            "max-bandwidth": .integer(plan.bandwidth == 0 ? 1 << 40 : Int64(plan.bandwidth)),
            "downtime-limit": 1,
            "throttle-trigger-threshold": 100,
            "cpu-throttle-initial": 1,
            "cpu-throttle-increment": 1,
            "max-cpu-throttle": 1,
        ])
    }

    /// A stream that breaks after QEMU has finished is how streams end.
    private func streamEnded(_ monitor: QMPClient, _ reason: String, _ attempt: Int) {
        Task(executorPreference: context.loop) {
            if let state = try? await monitor.migrationState(), state.status == "completed" { return }
            if attempt == self.attempt { self.lose(reason) }
        }
    }

    /// The memory did not get through. As long as the mirrors are whole it is sent again, from its start.
    func lose(_ reason: String) {
        // An attempt that went well for long has nothing to do with the trouble before it.
        if let attemptBegan, ContinuousClock.now - attemptBegan > .seconds(plan.patience) { troubleBegan = nil }
        let trouble = troubleBegan ?? .now
        troubleBegan = trouble
        // A stream that breaks again and again while the destination answers is bounded as an outage is.
        let isOver = attempt >= 2 && ContinuousClock.now - trouble > .seconds(plan.patience)
        guard mirrors.areWhole, attempt < Self.attemptsLimit, !isOver else {
            return context.fail(MigrationError(.failed, reason))
        }
        context.loseMemory(reason)
    }

    private func follow(_ monitor: QMPClient, _ watch: GuestWatch) async throws {
        var gateIsOpen = false
        var round = 0
        var peak = UInt64.max
        var idleRounds = 0
        var isThrottled = false
        var disksMeter = RateMeter()
        var diskConvergence = Convergence()
        var (sent, processed) = (RateMeter(), RateMeter())
        var yielded = 0
        while !watch.isAtSwitchover {
            let state = try await monitor.migrationState()
            if state.status == "failed" || state.status == "cancelled" {
                lose("QEMU could not send the memory: \(state.error ?? state.status)")
            }
            try context.check()
            try await mirrors.refreshJobs(monitor)
            disksMeter.add(mirrors.dataBytes)
            // The guest is not paused for a destination that is away.
            let mayOpen = !mirrors.isAway && mirrors.fits(max(disksMeter.peak, mirrors.rate))
            if mayOpen != gateIsOpen {
                gateIsOpen = mayOpen
                let limit = mayOpen ? plan.downtimeLimit : 1
                try await monitor.setMigrationParameters(["downtime-limit": .integer(Int64(limit))])
            }
            if mayOpen || mirrors.isAway {
                diskConvergence.reset()
            } else if diskConvergence.hasFailed(remaining: mirrors.remaining, rate: disksMeter.rate) {
                throw mirrors.notConverged("disks", mirrors.remaining, disksMeter.rate)
            }
            let rate = state.megabitsPerSecond * 1e6 / 8
            let percent = state.total == 0 ? 0 : 100 * (1 - Double(state.remaining) / Double(state.total))
            // Empty pages count as memory and cost nothing.
            sent.add(state.transferred)
            processed.add(state.processed)
            let seconds = processed.rate > 0 ? Double(state.remaining) / processed.rate : nil
            context.progress(percent: percent, rate: sent.rate, remaining: seconds)
            // What the copies of others have under way would be before everything that the pause waits for. The line has the memory to carry.
            if let seconds, gateIsOpen, seconds <= Self.lastSeconds, yielded < Self.mostYields {
                yielded += 1
                context.beacon?.raise(for: Self.yielding)
            }
            if gateIsOpen, state.rounds > round {
                // The first look after QEMU has gone through the memory shows what the guest dirtied meanwhile.
                let shrank = Double(state.remaining) < Double(peak) * 0.9
                idleRounds = shrank || round < 2 ? 0 : idleRounds + 1
                peak = state.remaining
                round = state.rounds
                if idleRounds >= 3, !isThrottled {
                    isThrottled = true
                    idleRounds = 0
                    context.warn("The guest writes its memory faster than it can be sent; slowing the guest down")
                    try await monitor.setMigrationParameters([
                        "max-cpu-throttle": 99, "cpu-throttle-initial": 20, "cpu-throttle-increment": 10,
                        "throttle-trigger-threshold": 25,
                    ])
                }
                if isThrottled, idleRounds >= Self.patienceWithThrottle {
                    throw mirrors.notConverged("memory", state.remaining, rate)
                }
            }
            // The event may have come while QEMU was asked; the guest is paused then, so there is nothing to wait for.
            if !watch.isAtSwitchover { try await context.wait(.milliseconds(100)) }
        }
    }

    // MARK: between attempts

    /// The guest goes on as if nothing had been tried, and the disks are still mirrored.
    func prepareRetry(_ monitor: QMPClient, _ watch: GuestWatch, _ reason: String) async throws {
        attempt += 1
        stream?.abort(reason)
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
        while ContinuousClock.now < end { try await context.wait(end - .now) }
        _ = try await link.connection()
    }

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
                throw MigrationError(.failed, "QEMU could not finish the migration: \(state.error ?? state.status)")
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

    func abort(_ reason: String) { stream?.abort(reason) }
}
