/// What the page shows, a section each: values that are sent whole when they have changed. `docs/web.md` describes the JSON.
struct Sections: Sendable, Hashable {
    var host: HostSection?
    var trouble: [TroubleEntry] = []
    var moves: [MoveEntry] = []
    var evacuation: EvacuationSection?
    var guests: [GuestEntry] = []
    var history: [HistoryEntry] = []

    /// The names, in the order in which they are sent.
    enum Name: String, Sendable, CaseIterable {
        case host, trouble, moves, evacuation, guests, history
    }

    /// What somebody sees.
    func limited(to audience: Audience) -> Sections {
        switch audience {
        case .everybody: return self
        case .guest(let guest): return limited(to: guest)
        case .nobody:
            var limited = Sections()
            limited.host = host
            // What is about the host names no guest.
            limited.trouble = trouble.filter { $0.guest == nil && $0.migration == nil && $0.evacuation == nil }
            return limited
        }
    }

    /// What somebody sees who may know of one guest only.
    private func limited(to guest: String) -> Sections {
        var limited = Sections()
        limited.host = host?.anonymous
        limited.trouble = trouble.filter { $0.guest == guest }
        limited.moves = moves.filter { $0.guest == guest }
        limited.guests = guests.filter { $0.name == guest }
        limited.history = history.filter { $0.guest == guest }
        return limited
    }
}

/// The host itself.
struct HostSection: Sendable, Hashable, Encodable {
    var name: String
    var version: String
    var `protocol` = 1
    var address: String?
    /// Seconds since 1970, when the section was made.
    var now: Double
    var cordon: String?
    var memory: WebHost.Amount?
    var disk: Disk?
    var certificate: Certificate?
    var emulators: [String] = []
    var peers: [WebHost.Peer] = []

    struct Disk: Sendable, Hashable, Encodable {
        var directory: String
        var amount: WebHost.Amount

        private enum CodingKeys: String, CodingKey { case directory }

        func encode(to encoder: any Encoder) throws {
            try amount.encode(to: encoder)
            var container = encoder.container(keyedBy: CodingKeys.self)
            try container.encode(directory, forKey: .directory)
        }
    }

    struct Certificate: Sendable, Hashable, Encodable {
        var name: String
        /// Seconds since 1970.
        var expires: Int
        var days: Int
    }

    /// Who may know of one guest learns nothing of the host but which one it is.
    var anonymous: HostSection { HostSection(name: name, version: version, now: now) }
}

/// Something that somebody has to mend.
struct TroubleEntry: Sendable, Hashable, Encodable {
    var guest: String?
    var migration: String?
    var evacuation: String?
    var kind: String
    var sentence: String
    var command: String?
}

/// A migration under way.
struct MoveEntry: Sendable, Hashable, Encodable {
    var migration: String
    var guest: String
    var direction: String
    var peer: String
    var phase: String?
    var percent: Double?
    var rate: Double?
    var dirtyRate: Double?
    var remaining: Double?
    var expectedPauseMS: Double?
    var began: Int?
    var canCancel: Bool

    private enum CodingKeys: String, CodingKey {
        case migration, guest, direction, peer, phase, percent, began
        case rate = "bytes_per_second"
        case dirtyRate = "dirty_bytes_per_second"
        case remaining = "remaining_s"
        case expectedPauseMS = "expected_pause_ms"
        case canCancel = "can_cancel"
    }
}

/// The latest evacuation.
struct EvacuationSection: Sendable, Hashable, Encodable {
    struct Counts: Sendable, Hashable, Encodable {
        var moved = 0
        var moving = 0
        var waiting = 0
        var left = 0
    }

    struct Guest: Sendable, Hashable, Encodable {
        var guest: String
        var target: String?
        var state: String
        var percent: Double?
        var remaining: Double?
        var pauseMS: Double?
        var reason: String?

        private enum CodingKeys: String, CodingKey {
            case guest, target, state, percent, reason
            case remaining = "remaining_s"
            case pauseMS = "pause_ms"
        }
    }

    var id: String
    var state: String
    var began: Int
    var deadline: Int?
    var targets: [String]
    var parallelCopies: Int
    var message: String?
    var counts = Counts()
    var remaining: Double?
    var guests: [Guest] = []

    private enum CodingKeys: String, CodingKey {
        case id, state, began, deadline, targets, message, counts, guests
        case parallelCopies = "parallel_copies"
        case remaining = "remaining_s"
    }
}

/// A guest of this host.
struct GuestEntry: Sendable, Hashable, Encodable {
    var name: String
    var state: String
    var memory: UInt64?
    var disk: UInt64?
    var processors: UInt64?
    var movable: Bool?
    var reason: String?
    var origin: String?
    var labels: [String: String] = [:]
    var evacuation: String?
    /// Which consoles of it can be had here.
    var console: ConsoleKinds?
}

/// Which consoles of a guest can be had here.
struct ConsoleKinds: Sendable, Hashable, Encodable {
    var serial: Bool
    var vnc: Bool
}

/// A migration that is not under way.
struct HistoryEntry: Sendable, Hashable, Encodable {
    var migration: String
    var guest: String
    var role: String
    var peer: String
    var outcome: String
    var began: Int?
    var tookMS: Double?
    var pauseMS: Double?
    var reason: String?
    var hasReport: Bool
    /// Which consoles can be had here of a guest that it has led away; nil when none can.
    var console: ConsoleKinds?

    private enum CodingKeys: String, CodingKey {
        case migration, guest, role, peer, outcome, began, reason, console
        case tookMS = "took_ms"
        case pauseMS = "pause_ms"
        case hasReport = "has_report"
    }
}
