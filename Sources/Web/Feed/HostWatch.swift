internal import FoundationEssentials
internal import IO
internal import Migration
internal import TLS

/// What is known of the host beside its state directory, asked for again when it is old: its figures, its fleet, its certificate and what
/// it finds wrong with itself. Confined to its loop.
final class HostWatch: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// Something that is asked for again after a time.
    private struct Periodic {
        let period: Duration
        private var asked: ContinuousClock.Instant?
        private var isAsking = false

        init(_ period: Duration) { self.period = period }

        mutating func begin(_ now: ContinuousClock.Instant) -> Bool {
            guard !isAsking, asked.map({ now - $0 >= period }) ?? true else { return false }
            (isAsking, asked) = (true, now)
            return true
        }
        mutating func end() { isAsking = false }
    }

    private let host: WebHost
    private let loop: EventLoop
    private let pool: BlockingPool
    private var figuresDue = Periodic(.seconds(5))
    private var peersDue = Periodic(.seconds(30))
    private var examinationDue = Periodic(.seconds(60))

    private var figures: WebHost.Figures?
    private var figuresTime = 0.0
    /// The hosts of the fleet.
    private(set) var peers: [WebHost.Peer] = []
    /// What the host finds wrong with itself.
    private(set) var findings: [Finding] = []
    /// The host's certificate for its servers.
    private(set) var certificate: HostSection.Certificate?

    init(_ host: WebHost, on loop: EventLoop, _ pool: BlockingPool) {
        self.host = host
        self.loop = loop
        self.pool = pool
    }

    /// Asks for what is old. The figures are waited for; the fleet and the examination of the host, which may take seconds, are not.
    func refresh() async {
        let now = ContinuousClock.now
        if peersDue.begin(now) { Task(executorPreference: loop) { await self.askPeers() } }
        if examinationDue.begin(now) { Task(executorPreference: loop) { await self.examine() } }
        if figuresDue.begin(now) { await readFigures() }
    }

    private func readFigures() async {
        figures = await host.figures()
        figuresTime = Date.now.timeIntervalSince1970
        figuresDue.end()
    }

    private func askPeers() async {
        peers = await host.peers()
        peersDue.end()
    }

    private func examine() async {
        let host = host
        (findings, certificate) = await pool.value { (Self.findings(host), Self.certificate(host)) }
        examinationDue.end()
    }

    private static func findings(_ host: WebHost) -> [Finding] {
        HostExamination(
            stateDirectory: host.stateDirectory,
            imageDirectory: host.imageDirectory,
            credentials: host.credentials
        ).findings()
    }

    static func certificate(_ host: WebHost) -> HostSection.Certificate? {
        guard let directory = host.credentials else { return nil }
        let entries = CredentialDirectory(checking: directory).entries.filter { $0.file.hasPrefix("server-cert") }
        guard let first = entries.min(by: { $0.notAfter < $1.notAfter }) else { return nil }
        let days = (Double(first.notAfter) - Date.now.timeIntervalSince1970) / 86400
        return HostSection.Certificate(
            name: first.subject,
            expires: first.notAfter,
            days: Int(min(max(days.rounded(.down), -1e6), 1e6))
        )
    }

    /// What the page shows of the host.
    func section(cordon: String?, emulators: Set<String>) -> HostSection {
        var section = HostSection(name: host.name, version: host.version, address: host.address, now: figuresTime)
        section.cordon = cordon
        section.memory = figures?.memory
        section.disk = figures.map { HostSection.Disk(directory: host.imageDirectory, amount: $0.disk) }
        section.certificate = certificate
        section.emulators = emulators.sorted().map { "QEMU \($0)" }
        section.peers = peers
        return section
    }
}
