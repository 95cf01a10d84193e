internal import Emulator
internal import Glibc
internal import IO
internal import Migration
internal import Source

/// What the migrations of a state directory are, read again only where a journal has changed. Blocks; used by one thread at a time.
struct MigrationLedger {
    /// What is kept of one that is over.
    struct Summary: Sendable {
        var migration: String
        var guest: String
        var peer: String
        var role: MigrationStatus.Role
        var state: String
        var detail: String
        var began: Int?
        var outcome: MigrationReport.Outcome?
        var code: Int32?
        var reason: String?
        var tookMS: Double?
        var pauseMS: Double?
        var diskBytes: UInt64 = 0
        var memoryBytes: UInt64 = 0
        var reconnects = 0
        var hasReport: Bool
        var isOver: Bool
    }

    private struct Known {
        var journal: FileStamp
        var report: FileStamp?
        var reading: JournalReading?
        var summary: Summary
        var isSettled: Bool
    }

    private let store: MigrationStore
    private var known: [String: Known] = [:]
    /// Every id, the latest first.
    private(set) var ids: [String] = []
    /// Those that are not over, or are in trouble, as they stand.
    private(set) var open: [MigrationStatus] = []

    init(_ store: MigrationStore) { self.store = store }

    /// Looks again.
    mutating func look() {
        ids = store.ids().reversed()
        let there = Set(ids)
        for id in known.keys where !there.contains(id) { known[id] = nil }
        open = []
        for id in ids { look(at: id) }
    }

    private mutating func look(at id: String) {
        let files = store.files(of: id)
        guard let journal = FileStamp(files.journal) else {
            known[id] = nil
            return
        }
        let report = FileStamp(files.report)
        var reading = known[id]?.reading
        if let former = known[id], former.journal == journal {
            if former.isSettled, former.report == report { return }
        } else {
            reading = (try? store.reading(of: id)) ?? nil
        }
        let status: MigrationStatus?
        if let reading {
            status = MigrationStatus(id, reading, in: store)
        } else {
            status = (try? MigrationStatus(of: id, in: store)) ?? nil
        }
        guard let status else { return }
        // Whether a guest that belongs elsewhere runs here no journal says.
        let isSettled = status.isOver && status.trouble == nil && status.state != "overruled"
        if !isSettled { open.append(status) }
        known[id] = Known(
            journal: journal,
            report: report,
            reading: reading,
            summary: Self.summary(status, hasReport: report != nil),
            isSettled: isSettled
        )
    }

    private static func summary(_ status: MigrationStatus, hasReport: Bool) -> Summary {
        let report = status.report
        var summary = Summary(
            migration: status.migration,
            guest: status.guest,
            peer: status.peer,
            role: status.role,
            state: status.state,
            detail: status.detail,
            began: status.began,
            outcome: report?.outcome,
            code: report?.code,
            reason: report?.reason,
            tookMS: report?.totalMS,
            pauseMS: report?.blackoutMS,
            hasReport: hasReport,
            isOver: status.isOver
        )
        summary.diskBytes = report?.disks.reduce(0) { $0.addingSaturated($1.bytesSent) } ?? 0
        summary.memoryBytes = report?.ramBytesSent ?? 0
        summary.reconnects = report?.reconnects ?? 0
        return summary
    }

    /// What is known of a migration.
    func summary(of id: String) -> Summary? { known[id]?.summary }

    /// All that is known, in no order.
    var summaries: some Sequence<Summary> { known.values.lazy.map(\.summary) }

    /// When a migration's journal was last written, in seconds before `now`.
    func age(of id: String, at now: Int) -> Int { known[id]?.journal.age(at: now) ?? 0 }

    /// How long a release may be under way before it is called undecided, in seconds.
    private static let patience = 10

    /// Those that somebody has to do something about, the latest first.
    func troubles() -> [MigrationStatus] {
        let now = time(nil)
        return open.filter { status in
            // A release that goes well is one for a moment.
            status.trouble != nil && !(status.isUnderWay && age(of: status.migration, at: now) < Self.patience)
        }
    }

    /// Why guests must not be started here, by their names.
    func startBars() -> [String: MigrationStore.StartBar] {
        var readings: [String: [(id: String, reading: JournalReading)]] = [:]
        for (id, one) in known {
            guard let reading = one.reading else { continue }
            readings[reading.guest, default: []].append((id, reading))
        }
        return readings.compactMapValues {
            MigrationStore.startBar(by: $0.sorted { $0.reading.order < $1.reading.order })
        }
    }
}
