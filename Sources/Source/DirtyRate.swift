internal import Emulator
internal import Migration

/// How fast a guest changes its memory, as QEMU finds out by looking at samples of its pages for a second (`calc-dirty-rate`). A page that is
/// changed often in that time counts once.
enum DirtyRate {
    /// For how long QEMU looks, and how long it is waited for beyond that: on a busy host it takes its time.
    private static let (time, patience) = (Duration.milliseconds(1050), Duration.seconds(4))

    /// How many pages of each GiB QEMU looks at: in a small guest by far more than of itself, for a few pages that happen to be quiet would
    /// decide there. QEMU takes 128 to 4,096.
    static func samples(memory: UInt64) -> Int {
        let wanted: UInt64 = 2048
        return Int(min(max(wanted * (1 << 30) / max(memory, 1 << 20), 512), 4096))
    }

    /// Looks for about a second.
    ///
    /// - Returns: bytes a second; nil when this QEMU does not tell.
    /// - Throws: as `MigrationContext.wait`, and when the task is cancelled.
    static func measure(_ monitor: QMPClient, _ context: MigrationContext) async throws -> Double? {
        /// Changes wake this as well as the time does.
        func wait(until time: ContinuousClock.Instant) async throws {
            while ContinuousClock.now < time {
                try await context.wait(time - ContinuousClock.now)
                try Task.checkCancellation()
            }
        }
        let start = ContinuousClock.now
        let samples = samples(memory: try await monitor.baseMemory())
        let order: JSONValue = ["calc-time": 1, "sample-pages": .integer(Int64(samples))]
        let isSampled = (try? await monitor.execute("calc-dirty-rate", order)) != nil
        try await wait(until: start + time)
        while isSampled {
            let state = try await monitor.execute("query-dirty-rate")
            if state["status"]?.string == "measured" { return Double(state["dirty-rate"]?.integer ?? 0) * 1_048_576 }
            if ContinuousClock.now > start + time + patience { break }
            try await wait(until: .now + .milliseconds(20))
        }
        return nil
    }
}
