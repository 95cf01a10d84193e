/// Where an outgoing or incoming migration is (`query-migrate`).
public struct MigrationState: Sendable {
    /// "none", "setup", "active", "pre-switchover", "device", "completed", "failed", "cancelled".
    public var status: String
    /// Bytes of memory sent.
    public var transferred: UInt64
    /// Bytes of memory not sent yet.
    public var remaining: UInt64
    /// Bytes of memory the guest has.
    public var total: UInt64
    /// Bytes of memory that QEMU is through with: pages that were sent, that were empty and only named, or of which what has changed was sent.
    public var processed: UInt64
    /// How many times the memory was gone through.
    public var rounds: Int
    /// Megabits per second, measured by QEMU.
    public var megabitsPerSecond: Double
    /// Why it failed.
    public var error: String?
    /// Percent of the guest's time taken by auto-converge.
    public var throttle: Int
    /// Bytes of memory that the guest changes in a second, as far as QEMU has measured it; nil before its first measurement.
    public var dirtyRate: Double?
    /// How long QEMU expects the guest to be paused, in milliseconds, if it were paused now; nil before it can tell.
    public var expectedPauseMS: Double?
}

extension QMPClient {
    /// Why the guest cannot be migrated; empty when it can (`query-migrate`, `blocked-reasons`).
    public func migrationBlockers() async throws -> [String] {
        try await execute("query-migrate")["blocked-reasons"]?.array.compactMap(\.string) ?? []
    }

    /// Where the migration is.
    public func migrationState(timeout: Duration = .seconds(10)) async throws -> MigrationState {
        let state = try await execute("query-migrate", timeout: timeout)
        let ram = state["ram"]
        func number(_ key: String) -> UInt64 { UInt64(clamping: ram?[key]?.integer ?? 0) }
        let deltas = UInt64(clamping: state["xbzrle-cache"]?["pages"]?.integer ?? 0)
        var rate = 0.0
        switch ram?["mbps"] {
        case .number(let value): rate = value
        case .integer(let value): rate = Double(value)
        default: break
        }
        return MigrationState(
            status: state["status"]?.string ?? "none",
            transferred: number("transferred"),
            remaining: number("remaining"),
            total: number("total"),
            processed: (number("normal") + number("duplicate") + deltas) * number("page-size"),
            rounds: Int(ram?["dirty-sync-count"]?.integer ?? 0),
            megabitsPerSecond: rate,
            error: state["error-desc"]?.string,
            throttle: Int(state["cpu-throttle-percentage"]?.integer ?? 0),
            dirtyRate: ram?["dirty-pages-rate"]?.integer.map { Double($0) * Double(number("page-size")) },
            expectedPauseMS: state["expected-downtime"]?.integer.map { Double($0) }
        )
    }

    /// Whether what the guest writes to its memory while it is sent may get lost: QEMU before 9.0 misses writes of processors that it emulates
    /// (TCG) after each pass over the memory. Those of KVM are not concerned, and a guest that is paused writes nothing.
    ///
    /// Source: `query-kvm`; QEMU's commit "physmem: Fix migration dirty bitmap coherency with TCG memory access".
    public func losesWritesOfMovingGuests() async throws -> Bool {
        guard let major = version.split(separator: ".").first.flatMap({ Int($0) }), major < 9 else { return false }
        return try await execute("query-kvm")["enabled"]?.bool == false
    }

    /// Switches capabilities on or off (`migrate-set-capabilities`).
    public func setCapabilities(_ names: [String], to state: Bool) async throws {
        let list = names.map { JSONValue.object(["capability": .string($0), "state": .bool(state)]) }
        try await execute("migrate-set-capabilities", ["capabilities": .array(list)])
    }

    /// Sets parameters (`migrate-set-parameters`).
    public func setMigrationParameters(_ parameters: [String: JSONValue]) async throws {
        try await execute("migrate-set-parameters", .object(parameters))
    }

    /// Starts an outgoing migration to a Unix socket (`migrate`).
    public func migrate(toSocket path: String) async throws {
        try await execute("migrate", ["uri": .string("unix:\(path)")])
    }

    /// Lets a QEMU started with `-incoming defer` accept a migration on a Unix socket (`migrate-incoming`).
    public func migrateIncoming(socket path: String) async throws {
        try await execute("migrate-incoming", ["uri": .string("unix:\(path)")])
    }

    /// Goes on from pre-switchover (`migrate-continue`).
    public func continueMigration() async throws {
        try await execute("migrate-continue", ["state": "pre-switchover"])
    }

    /// Gives the outgoing migration up; QEMU resumes the guest by itself (`migrate_cancel`).
    public func cancelMigration() async throws { try await execute("migrate_cancel") }

    /// Wakes a migration that was cancelled in the very moment in which it came to pre-switchover (`migrate-continue`).
    ///
    /// QEMU 7.2 lets go of its lock between looking whether it was cancelled and saying that it is at pre-switchover. A `migrate_cancel` in
    /// between wakes nobody, since nobody waits yet, and its migration then waits for ever in the state "cancelling", with the guest stopped. To
    /// any other migration this word says nothing, and QEMU forgets it before it waits the next time.
    ///
    /// - Throws: `QMPError` with `refused` when no migration is being cancelled.
    public func wakeCancelledMigration() async throws {
        try await execute("migrate-continue", ["state": "cancelling"])
    }
}
