internal import Migration
internal import Source

/// What the migrations of a host add up to. Each is counted once, when it is over; one whose files are removed later stays counted as long
/// as this value lives.
struct MigrationTotals: Sendable {
    private struct Kind: Sendable, Hashable {
        var direction: String
        var outcome: String
        var code: Int32
    }

    private var counted: Set<String> = []
    private var kinds: [Kind: UInt64] = [:]
    private var pauses = Histogram([0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10])
    private var durations = Histogram([1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200])
    private var diskBytes = 0.0
    private var memoryBytes = 0.0
    private var mismatches: UInt64 = 0
    private var reconnects: UInt64 = 0

    init() {}

    /// Counts what has ended since.
    mutating func take(_ ledger: MigrationLedger) {
        for summary in ledger.summaries where summary.isOver && !counted.contains(summary.migration) {
            counted.insert(summary.migration)
            count(summary)
        }
        // A removed one does not come back.
        let there = Set(ledger.ids)
        counted.formIntersection(there)
    }

    private mutating func count(_ summary: MigrationLedger.Summary) {
        let isSource = summary.role == .source
        let outcome =
            switch summary.state {
            case "migrated", "owned", "taken": "done"
            case "overruled": "overruled"
            default: "rolled_back"
            }
        let code = summary.code ?? 0
        kinds[Kind(direction: isSource ? "out" : "in", outcome: outcome, code: code), default: 0] += 1
        guard isSource else { return }
        diskBytes += Double(summary.diskBytes)
        memoryBytes += Double(summary.memoryBytes)
        reconnects += UInt64(max(summary.reconnects, 0))
        if code == MigrationError.Code.mismatch.rawValue { mismatches += 1 }
        guard summary.outcome == .migrated else { return }
        if let pause = summary.pauseMS { pauses.add(pause / 1000) }
        if let took = summary.tookMS { durations.add(took / 1000) }
    }

    /// Adds the figures.
    func write(to text: inout MetricsText) {
        for (kind, count) in kinds.sorted(by: { "\($0.key)" < "\($1.key)" }) {
            text.add(
                .migrations,
                Double(count),
                ["direction": kind.direction, "outcome": kind.outcome, "code": "\(kind.code)"]
            )
        }
        text.add(.pause, pauses)
        text.add(.duration, durations)
        text.add(.transferred, diskBytes, ["channel": "disk", "direction": "out"])
        text.add(.transferred, memoryBytes, ["channel": "memory", "direction": "out"])
        text.add(.mismatches, Double(mismatches))
        text.add(.reconnects, Double(reconnects))
    }
}
