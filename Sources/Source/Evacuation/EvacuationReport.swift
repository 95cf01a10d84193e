internal import IO

/// How far an evacuation is, for who watches: `progress.json`.
public struct EvacuationProgress: Sendable, Codable {
    /// A guest.
    public struct Guest: Sendable, Codable {
        /// Its name.
        public var name: String
        /// Where it stands: as in `EvacuationEvent`.
        public var state: String
        /// Where it goes, or has gone.
        public var target: String?
        /// The phase of its migration.
        public var phase: String?
        /// How far that is, 0 to 100.
        public var percent: Double?
        /// Bytes per second.
        public var rate: Double?
        /// Seconds until the phase is over.
        public var remaining: Double?
        /// The pause, in milliseconds.
        public var blackoutMS: Double?
        /// Why it stays, or what is waited for.
        public var message: String?
        /// Bytes of memory and disk that are to be moved.
        public var size: UInt64

        private enum CodingKeys: String, CodingKey {
            case name, state, target, phase, percent, rate, remaining, message, size
            case blackoutMS = "blackout_ms"
        }
    }

    /// The evacuation's id.
    public var evacuation: String
    /// The guests, in the order in which they are begun.
    public var guests: [Guest]
    /// Why no guest is begun any more.
    public var ending: Evacuation.Ending?
    /// Whether nothing is left to do.
    public var isOver: Bool
    /// Seconds until all have moved, by their estimates and by what is known of those under way; nil when nobody can tell.
    public var remaining: Double?

    private enum CodingKeys: String, CodingKey {
        case evacuation, guests, ending, remaining
        case isOver = "is_over"
    }

    /// Describes a plan.
    ///
    /// - Parameter latest: the last word about each guest.
    init(_ plan: Evacuation, _ latest: [String: EvacuationEvent] = [:]) {
        evacuation = plan.id
        ending = plan.ending
        isOver = plan.isOver
        var seconds: Double? = 0
        guests = plan.guests.map { guest in
            let event = latest[guest.name]
            let size = guest.memory &+ guest.disk
            var row = Guest(name: guest.name, state: event?.state ?? "planned", size: size)
            (row.target, row.message) = (event?.target ?? guest.targets.first.map { "\($0)" }, event?.message)
            switch guest.standing {
            case .planned, .waiting:
                if case .waiting(_, let reason) = guest.standing { row.message = event?.message ?? reason }
                row.state = if case .waiting = guest.standing { "waiting" } else { "planned" }
                seconds = seconds.flatMap { sum in guest.seconds.map { sum + $0 } }
            case .moving(_, let target):
                row.target = "\(target)"
                row.state = event?.state == "switching" ? "switching" : "copying"
                (row.phase, row.percent) = (event?.phase, event?.percent)
                (row.rate, row.remaining) = (event?.rate, event?.remaining)
                seconds = seconds.flatMap { sum in (event?.remaining ?? guest.seconds).map { sum + $0 } }
            case .moved(_, let target):
                (row.state, row.target, row.blackoutMS) = ("moved", "\(target)", guest.blackoutMS)
            case .undecided(_, let target): (row.state, row.target) = ("undecided", "\(target)")
            case .stays(let reason): (row.state, row.target, row.message) = ("stays", nil, reason)
            }
            return row
        }
        for (name, reason) in plan.staying.sorted(by: { $0.key < $1.key }) {
            guests.append(Guest(name: name, state: "stays", message: reason, size: 0))
        }
        remaining = isOver ? nil : seconds
    }
}

/// How an evacuation went: `report.json`.
public struct EvacuationReport: Sendable, Codable {
    /// The evacuation's id.
    public var evacuation: String
    /// The exit code.
    public var code: Int32
    /// When it began and ended, in seconds since 1970.
    public var began: Int
    /// See `began`.
    public var ended: Int
    /// The guests.
    public var guests: [EvacuationProgress.Guest]
    /// Guests and other QEMUs that are still on this host.
    public var left: [String]

    init(_ plan: Evacuation, code: Int32, left: [String], ended: Int) {
        evacuation = plan.id
        self.code = code
        began = plan.began
        self.ended = ended
        guests = EvacuationProgress(plan).guests
        self.left = left
    }

    /// The report as JSON text.
    public var json: String {
        guard let data = try? JSONText.encode(self, pretty: true) else { return "{}" }
        return String(decoding: data, as: UTF8.self) + "\n"
    }

    /// What is said at the end.
    public var sentence: String {
        let moved = guests.count { $0.state == "moved" }
        let undecided = guests.filter { $0.state == "undecided" }.map(\.name)
        let doubt =
            undecided.isEmpty
            ? "" : "; whose \(undecided.joined(separator: ", ")) is, is not known yet: see 'crossdock status'"
        let what = moved == 1 ? "1 guest has moved" : "\(moved) guests have moved"
        if code == 0 { return left.isEmpty ? "\(what); this host is empty" : "\(what), all that were asked for" }
        let reason =
            switch code {
            case 22: "The deadline is over. "
            case 23: "The evacuation was cancelled. "
            default: ""
            }
        return "\(reason)\(what), and on this host are still: \(left.joined(separator: ", "))\(doubt)"
    }
}
