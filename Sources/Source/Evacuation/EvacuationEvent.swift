internal import IO
internal import Migration

/// One line of `crossdock evacuate --json` and of an evacuation's `events.jsonl`.
public struct EvacuationEvent: Sendable, Codable {
    /// "begun", "guest", "progress", "warning", "finished".
    public var event: String
    /// The evacuation's id.
    public var evacuation: String
    /// Seconds since 1970.
    public var time: Int
    /// With "guest" and "progress": whom it is about.
    public var guest: String?
    /// Where it stands: "planned", "copying", "switching", "waiting", "moved", "undecided", "stays".
    public var state: String?
    /// Where it goes.
    public var target: String?
    /// Its migration.
    public var migration: String?
    /// The phase of the migration, as in `MigrationEvent`.
    public var phase: String?
    /// How far the phase is, 0 to 100.
    public var percent: Double?
    /// Bytes per second.
    public var rate: Double?
    /// Seconds until the phase is over, estimated.
    public var remaining: Double?
    /// The pause, in milliseconds.
    public var blackoutMS: Double?
    /// Words for a person.
    public var message: String?
    /// With "finished": the exit code.
    public var code: Int32?

    private enum CodingKeys: String, CodingKey {
        case event, evacuation, time, guest, state, target, migration, phase, percent, rate, remaining, message, code
        case blackoutMS = "blackout_ms"
    }

    /// Makes an event.
    public init(_ event: String, evacuation: String, time: Int) {
        self.event = event
        self.evacuation = evacuation
        self.time = time
    }

    /// Takes over how far a migration is; nil when it is not known.
    mutating func measure(_ event: MigrationEvent?) {
        (percent, rate, remaining) = (event?.percent, event?.rate, event?.remaining)
    }

    /// The event as one line of JSON, with its end.
    public var line: String {
        guard let data = try? JSONText.encode(self) else { return "" }
        return String(decoding: data, as: UTF8.self) + "\n"
    }

    /// Reads a line; nil when it is none.
    public init?(parsing line: [UInt8]) {
        guard let event = JSONText.decode(EvacuationEvent.self, from: line) else { return nil }
        self = event
    }
}
