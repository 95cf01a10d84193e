internal import Emulator
internal import IO
internal import Migration
internal import Source

/// Which guests stand still until somebody does something, for who looks at their consoles: looked at only as long as somebody does. Confined to its
/// loop; the state directory is read by threads of the pool.
final class TroubleWatch: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// What the pool works with. One look at a time: nobody else has it meanwhile.
    private final class Workshop: @unchecked Sendable {
        var ledger: MigrationLedger

        init(_ store: MigrationStore) { ledger = MigrationLedger(store) }
    }

    /// How a guest's QEMU has said that it stands.
    private struct Answer {
        var runState: String?
        var at: ContinuousClock.Instant
    }

    /// How long a look is good.
    private static let period = Duration.milliseconds(900)
    /// After how long a guest's QEMU is asked again.
    private static let rest = Duration.seconds(5)
    /// How long it may take to answer.
    private static let patience = Duration.seconds(5)

    private let host: String
    private let guests: GuestStore
    private let loop: EventLoop
    private let pool: BlockingPool
    private let workshop: Workshop
    private let lock = AsyncLock()
    private var looked: ContinuousClock.Instant?
    private var troubles: [String: MigrationStatus] = [:]
    private var answers: [String: Answer] = [:]
    private var asking: Set<String> = []

    init(_ host: WebHost, on loop: EventLoop, _ pool: BlockingPool) {
        self.host = host.name
        guests = GuestStore(stateDirectory: host.stateDirectory)
        (self.loop, self.pool) = (loop, pool)
        workshop = Workshop(MigrationStore(stateDirectory: host.stateDirectory))
    }

    /// What keeps a guest from going on; nil when nothing does, or its QEMU has not been heard yet: that is not waited for.
    func trouble(of guest: String) async -> GuestTrouble? {
        await look()
        guard let status = troubles[guest] else {
            answers[guest] = nil
            return nil
        }
        guard GuestTrouble.dependsOnEmulator(status) else {
            return GuestTrouble(status, runState: nil, host: host)
        }
        let answer = answers[guest]
        if answer.map({ ContinuousClock.now - $0.at >= Self.rest }) ?? true { ask(guest) }
        return answer.flatMap { GuestTrouble(status, runState: $0.runState, host: host) }
    }

    private func look() async {
        await lock.acquire()
        defer { lock.release() }
        if let looked, ContinuousClock.now - looked < Self.period { return }
        let workshop = workshop
        let found = await pool.value {
            workshop.ledger.look()
            return workshop.ledger.troubles()
        }
        // The latest one of a guest is the first.
        troubles = Dictionary(found.map { ($0.guest, $0) }, uniquingKeysWith: { first, _ in first })
        looked = .now
    }

    private func ask(_ guest: String) {
        guard asking.insert(guest).inserted else { return }
        Task(executorPreference: loop) {
            let runState = await self.runState(of: guest)
            self.answers[guest] = Answer(runState: runState, at: .now)
            self.asking.remove(guest)
        }
    }

    private func runState(of guest: String) async -> String? {
        let guests = guests
        let record = await pool.value { (try? guests.load(guest)) ?? nil }
        // An adopted guest has one monitor, which is for who repairs it.
        guard let record, record.adopted == nil,
            let monitor = try? await guests.connect(to: record, .status, on: loop, timeout: Self.patience)
        else { return nil }
        defer { monitor.close() }
        return try? await monitor.status(timeout: Self.patience)
    }
}
