internal import Emulator
internal import IO
internal import Migration

/// What is under way on this host, looked at about once a second as long as somebody looks, made ready once for all viewers. Confined to
/// its loop; reading and encoding are done by threads of the pool.
final class Feed: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// What the pool works with. One look at a time: nobody else has it meanwhile.
    private final class Workshop: @unchecked Sendable {
        var reader: StateReader
        var writer = SectionWriter()

        init(_ host: WebHost) { reader = StateReader(host) }
    }

    /// Between two looks, while a guest moves and otherwise.
    private static let (busy, calm) = (Duration.milliseconds(250), Duration.seconds(1))
    /// How long the looks stay close after a migration has begun or ended.
    private static let excitement = Duration.seconds(3)
    /// Between two looks at whether viewers may stay.
    private static let inspection = Duration.seconds(5)

    private let loop: EventLoop
    private let pool: BlockingPool
    /// What is known of the host beside its state directory.
    let watch: HostWatch
    private let looks: GuestLooks
    private let lock = AsyncLock()
    private let workshop: Workshop
    private var viewers: [ObjectIdentifier: Viewer] = [:]
    private var newcomers: [Viewer] = []
    private var isRunning = false
    private var isFirst = true
    private var isOver = false
    private var inspected = ContinuousClock.now
    /// The directory of the migrations, and how it was listed last.
    private let migrations: String
    private var listed: FileStamp?
    private var excited: ContinuousClock.Instant?

    init(_ host: WebHost, on loop: EventLoop, _ pool: BlockingPool) {
        self.loop = loop
        self.pool = pool
        watch = HostWatch(host, on: loop, pool)
        looks = GuestLooks(GuestStore(stateDirectory: host.stateDirectory), on: loop)
        workshop = Workshop(host)
        migrations = MigrationStore(stateDirectory: host.stateDirectory).directory
    }

    /// How many look.
    var count: Int { viewers.count }
    /// How many of them somebody has.
    func count(of visitor: String) -> Int { viewers.values.count { $0.visitor == visitor } }

    /// Serves a viewer until it goes.
    func serve(_ viewer: Viewer) async {
        guard !isOver else { return }
        viewers[ObjectIdentifier(viewer)] = viewer
        newcomers.append(viewer)
        if !isRunning {
            isRunning = true
            Task(executorPreference: loop) { await self.run() }
        }
        await viewer.serve()
        viewers[ObjectIdentifier(viewer)] = nil
        newcomers.removeAll { $0 === viewer }
    }

    /// Ends all viewers.
    func stop() {
        isOver = true
        for viewer in viewers.values { viewer.end("The agent ends") }
    }

    /// Looks once, for who wants figures and no events.
    ///
    /// - Parameter body: gets what was found on a thread of the pool, and is not to block.
    func glance<T: Sendable>(
        _ body: @escaping @Sendable (StateReader.Look, MigrationLedger, HostSection) -> T
    ) async -> T {
        await watch.refresh()
        await lock.acquire()
        defer { lock.release() }
        let (found, findings, workshop) = (looks.looks, watch.findings, workshop)
        let section = watch.section(cordon: nil, emulators: Set(found.values.map(\.emulator)))
        let certificate = watch.certificate
        let (result, askable, present) = await pool.value {
            let look = workshop.reader.look(
                found,
                findings: findings,
                certificate: certificate,
                takesEvents: false
            )
            return (body(look, workshop.reader.ledger, section), look.askable, look.present)
        }
        looks.refresh(askable, of: present)
        return result
    }

    private func run() async {
        defer { isRunning = false }
        isFirst = true
        while !viewers.isEmpty, !isOver {
            let isBusy = await look()
            inspect()
            await pause(isBusy ? Self.busy : Self.calm)
        }
    }

    /// Waits for the next look, which is at once when somebody new has come, or a migration begins.
    private func pause(_ time: Duration) async {
        let end = ContinuousClock.now + time
        while newcomers.isEmpty, !viewers.isEmpty, ContinuousClock.now < end {
            await loop.sleep(for: .milliseconds(100))
            let stamp = FileStamp(migrations)
            guard stamp != listed else { continue }
            (listed, excited) = (stamp, .now)
            return
        }
    }

    /// Ends those who may not look any more.
    private func inspect() {
        guard ContinuousClock.now - inspected > Self.inspection else { return }
        inspected = .now
        for viewer in viewers.values where !viewer.mayStay() { viewer.end("The session is over") }
    }

    private func look() async -> Bool {
        await watch.refresh()
        let (found, findings, certificate) = (looks.looks, watch.findings, watch.certificate)
        let (workshop, isFirst) = (workshop, isFirst)
        self.isFirst = false
        await lock.acquire()
        let look = await pool.value {
            // What happened while nobody looked is in the history.
            if isFirst { workshop.reader.forgetEvents() }
            return workshop.reader.look(found, findings: findings, certificate: certificate)
        }
        looks.refresh(look.askable, of: look.present)
        var sections = look.sections
        sections.host = watch.section(cordon: look.cordon, emulators: Set(looks.looks.values.map(\.emulator)))
        // Those who come meanwhile have their first sections with the next look.
        let arrived = newcomers
        newcomers = []
        let audiences = Set(viewers.values.map(\.audience))
        let (changed, whole) = await pool.value { [sections] in
            let changed = workshop.writer.write(sections, for: audiences)
            var whole: [Audience: [Sections.Name: Payload]] = [:]
            for audience in audiences { whole[audience] = workshop.writer.lines(for: audience) }
            return (changed, whole)
        }
        lock.release()
        let events = look.events.map { (guest: $0.guest, payload: Payload($0.bytes)) }
        for viewer in viewers.values where !newcomers.contains(where: { $0 === viewer }) {
            for event in events where viewer.audience.includes(event.guest) { viewer.add(event.payload) }
            let isNew = arrived.contains { $0 === viewer }
            for (name, line) in (isNew ? whole : changed)[viewer.audience] ?? [:] { viewer.put(name, line) }
            viewer.send()
        }
        return !look.sections.moves.isEmpty || excited.map { ContinuousClock.now - $0 < Self.excitement } ?? false
    }
}
