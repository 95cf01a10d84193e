internal import Emulator
internal import IO
internal import Migration
internal import TLS

/// What the parts of a migration share: the plan, where things are, the report, what the operator is told, and what ends a wait.
///
/// Confined to the control loop.
final class MigrationContext: @unchecked Sendable {
    // Unchecked: confined to the control loop.
    let plan: MigrationPlan
    let credentials: any TLSCredentials
    let loop: EventLoop
    let dataLoops: EventLoopGroup
    let guests: GuestStore
    let migrations: MigrationStore
    var files: MigrationFiles { migrations.files(of: plan.id) }
    var report: MigrationReport
    /// Tells other copies of an evacuation that this guest is paused, and this one that another is.
    let beacon: PauseBeacon?
    private let emit: @Sendable (MigrationEvent) -> Void
    private let began = ContinuousClock.now
    private var phaseBegan = ContinuousClock.now
    private var phase = ""

    /// The first reason to end the migration from outside its main flow.
    private(set) var fault: MigrationError?
    /// Why the memory has to be sent again.
    private var memoryLoss: MemoryLost?
    private let changed = AsyncCondition()
    /// Whether the guest became known here for a rehearsal only.
    var forgetsGuest = false
    /// Whether a reason to end it still counts.
    var mayBeInterrupted: () -> Bool = { true }
    /// Is told of the first reason.
    var onFault: ((MigrationError) -> Void)?

    init(
        plan: MigrationPlan,
        credentials: any TLSCredentials,
        loop: EventLoop,
        dataLoops: EventLoopGroup,
        emit: @escaping @Sendable (MigrationEvent) -> Void
    ) {
        self.plan = plan
        self.credentials = credentials
        self.loop = loop
        self.dataLoops = dataLoops
        self.emit = emit
        guests = GuestStore(stateDirectory: plan.stateDirectory)
        migrations = MigrationStore(stateDirectory: plan.stateDirectory)
        beacon = plan.evacuation.flatMap { _ in try? EvacuationFiles(stateDirectory: plan.stateDirectory).beacon() }
        report = MigrationReport(migration: plan.id, guest: plan.guest, destination: "\(plan.address)")
    }

    // MARK: what ends a wait

    /// Notes the first reason to stop, and wakes the main flow.
    func fail(_ error: MigrationError) {
        if fault == nil, mayBeInterrupted() {
            fault = error
            onFault?(error)
        }
        changed.signal()
    }

    /// The memory has to be sent again.
    func loseMemory(_ reason: String) {
        if memoryLoss == nil { memoryLoss = MemoryLost(reason: reason) }
        changed.signal()
    }

    /// A new attempt begins.
    func forgetMemoryLoss() { memoryLoss = nil }

    /// Throws the reason to stop, if there is one, or `MemoryLost`.
    func check() throws {
        if let fault { throw fault }
        if let memoryLoss { throw memoryLoss }
    }

    /// Throws the reason to stop, if there is one.
    func checkFault() throws { if let fault { throw fault } }

    /// Waits for a change or for the time to pass.
    ///
    /// - Throws: as `check`.
    func wait(_ time: Duration) async throws {
        try check()
        let timer = loop.schedule(after: time) { self.changed.signal() }
        defer { timer.cancel() }
        await changed.wait()
        try check()
    }

    /// Waits for a change.
    func waitForChange() async { await changed.wait() }

    func wake() { changed.signal() }

    // MARK: what the operator is told

    static func megabytes(_ bytes: Double) -> String { "\((bytes / 1e5).rounded() / 10) MB" }

    static func milliseconds(_ duration: Duration) -> Double {
        Double(duration.components.seconds) * 1000 + Double(duration.components.attoseconds) / 1e15
    }

    private func event(_ name: String) -> MigrationEvent {
        MigrationEvent(
            name,
            migration: plan.id,
            guest: plan.guest,
            ms: Self.milliseconds(ContinuousClock.now - began)
        )
    }

    /// A phase begins; the time that the one before took is noted.
    func enter(_ name: String) {
        endPhase()
        phase = name
        var event = event("phase")
        event.phase = name
        emit(event)
    }

    private func endPhase() {
        if !phase.isEmpty { report.phasesMS[phase, default: 0] += Self.milliseconds(ContinuousClock.now - phaseBegan) }
        phaseBegan = .now
    }

    func progress(
        percent: Double,
        rate: Double,
        remaining: Double?,
        seeded: UInt64? = nil,
        memory: MigrationState? = nil,
        of phase: String? = nil
    ) {
        var event = event("progress")
        event.phase = phase ?? self.phase
        event.percent = min(max(percent, 0), 100)
        event.rate = rate
        event.remaining = remaining
        event.seededBytes = seeded
        (event.dirtyRate, event.expectedPauseMS) = (memory?.dirtyRate, memory?.expectedPauseMS)
        emit(event)
    }

    func warn(_ message: String) {
        var event = event("warning")
        event.message = message
        emit(event)
    }

    /// The migration has ended: the times are complete, and the report is told.
    func finish() {
        endPhase()
        report.phasesMS["done"] = nil
        report.totalMS = Self.milliseconds(ContinuousClock.now - began)
        if let text = try? MigrationReportFile.save(report, migrations) { warn(text) }
        var event = event("finished")
        event.report = report
        emit(event)
    }

    /// What the other side said, as it may be shown.
    static func said(_ text: String) -> String { text.shown(most: 1000) }
}
