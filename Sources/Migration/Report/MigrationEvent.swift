internal import IO

/// One line of `crossdock migrate --json` and of a migration's `events.jsonl`.
public struct MigrationEvent: Sendable, Codable {
    /// "phase", "progress", "warning", "finished".
    public var event: String
    /// The migration's id.
    public var migration: String
    /// The guest's name.
    public var guest: String
    /// Milliseconds since the migration began.
    public var ms: Double
    /// The phase: "check", "disks", "verify", "memory", "switchover", "release", "done"; in an evacuation also "queue", before "disks", and
    /// "turn", before "memory", while the guest waits for others.
    public var phase: String?
    /// How far the phase is, 0 to 100.
    public var percent: Double?
    /// Bytes per second.
    public var rate: Double?
    /// Seconds until the phase is over, estimated.
    public var remaining: Double?
    /// Bytes of memory that the guest changes in a second, in the phase "memory"; nil when it is not known.
    public var dirtyRate: Double?
    /// How long the guest would be paused now for its memory, in milliseconds, as QEMU estimates it; nil when it is not known.
    public var expectedPauseMS: Double?
    /// Bytes of the disks that the destination had already, so far; nil when no disk was begun with an image.
    public var seededBytes: UInt64?
    /// Words for a person.
    public var message: String?
    /// With "finished": the report.
    public var report: MigrationReport?

    private enum CodingKeys: String, CodingKey {
        case event, migration, guest, ms, phase, percent, rate, remaining, message, report
        case dirtyRate = "dirty_rate"
        case expectedPauseMS = "expected_pause_ms"
        case seededBytes = "seeded_bytes"
    }

    /// Makes an event.
    public init(_ event: String, migration: String, guest: String, ms: Double) {
        self.event = event
        self.migration = migration
        self.guest = guest
        self.ms = ms
    }

    /// The event as one line of JSON, with its end.
    public var line: String {
        guard let data = try? JSONText.encode(self) else { return "" }
        return String(decoding: data, as: UTF8.self) + "\n"
    }

    /// Reads a line; nil when it is none.
    public init?(parsing line: [UInt8]) {
        guard let event = JSONText.decode(MigrationEvent.self, from: line) else { return nil }
        self = event
    }
}
