/// Every figure that there is for Prometheus: its name, its kind and what it means. Base units; no label takes a value that strangers choose
/// without end: guests are those under way, peers those of the fleet.
enum Metric: String, Sendable, CaseIterable {
    case build = "crossdock_build_info"
    case emulator = "crossdock_emulator_info"
    case migrations = "crossdock_migrations_total"
    case phase = "crossdock_migration_phase"
    case progress = "crossdock_migration_progress_ratio"
    case rate = "crossdock_migration_transfer_bytes_per_second"
    case dirtyRate = "crossdock_migration_memory_dirty_bytes_per_second"
    case remaining = "crossdock_migration_estimated_seconds"
    case expectedPause = "crossdock_migration_estimated_blackout_seconds"
    case pause = "crossdock_blackout_seconds"
    case duration = "crossdock_migration_duration_seconds"
    case transferred = "crossdock_transferred_bytes_total"
    case mismatches = "crossdock_verify_failures_total"
    case reconnects = "crossdock_reconnects_total"
    case guests = "crossdock_guests"
    case movable = "crossdock_guests_movable"
    case undecided = "crossdock_undecided_migrations"
    case interrupted = "crossdock_interrupted_migrations"
    case oldestOpen = "crossdock_journal_oldest_open_seconds"
    case trouble = "crossdock_trouble"
    case cordoned = "crossdock_host_cordoned"
    case memory = "crossdock_host_memory_bytes"
    case memoryReserved = "crossdock_host_memory_reserved_bytes"
    case memoryFree = "crossdock_host_memory_free_bytes"
    case pool = "crossdock_pool_bytes"
    case poolReserved = "crossdock_pool_reserved_bytes"
    case poolFree = "crossdock_pool_free_bytes"
    case evacuationGuests = "crossdock_evacuation_guests"
    case evacuationRunning = "crossdock_evacuation_running"
    case evacuationDeadline = "crossdock_evacuation_deadline_timestamp_seconds"
    case certificate = "crossdock_certificate_expiry_timestamp_seconds"
    case peerUp = "crossdock_peer_up"
    case peerRoundTrip = "crossdock_peer_round_trip_seconds"
    case peerClock = "crossdock_peer_clock_offset_seconds"
    case handshakes = "crossdock_tls_handshakes_total"
    case exportConnections = "crossdock_export_connections"
    case consoleSessions = "crossdock_console_sessions"
    case viewers = "crossdock_web_viewers"
    case sessions = "crossdock_web_sessions"

    /// What Prometheus calls its kind.
    enum Kind: String, Sendable {
        case counter, gauge, histogram
    }

    /// Its kind.
    var kind: Kind {
        switch self {
        case .migrations, .transferred, .mismatches, .reconnects, .handshakes: .counter
        case .pause, .duration: .histogram
        default: .gauge
        }
    }

    /// What it means, a sentence.
    var help: String {
        switch self {
        case .build: "The release of the agent, as a label."
        case .emulator: "The versions of QEMU that the guests of this host run, as a label."
        case .migrations: "Migrations that are over, by direction, outcome and exit code."
        case .phase: "1 for the phase of each migration under way."
        case .progress: "How far the phase of a migration under way is, 0 to 1."
        case .rate: "What a migration under way sends in a second."
        case .dirtyRate: "Memory that a guest under way changes in a second, as QEMU measures it."
        case .remaining: "Estimated time until the phase of a migration under way is over."
        case .expectedPause: "Estimated pause of a guest under way for its memory, as QEMU estimates it."
        case .pause: "How long guests that left this host were paused, an upper bound."
        case .duration: "How long migrations from this host took that went well."
        case .transferred: "Payload of migrations, by channel: sent by those that are over, and received by the agent."
        case .mismatches: "Migrations from this host after which the digests of a disk differed."
        case .reconnects: "Lost connections that migrations from this host have opened again."
        case .guests: "Guests that belong to this host, by their state."
        case .movable: "Guests that belong to this host, by whether something is known that keeps them from moving."
        case .undecided: "Migrations of which nobody knows yet whose the guest is."
        case .interrupted: "Migrations that are not over and that nobody works on."
        case .oldestOpen: "Age of the oldest migration that is not over."
        case .trouble: "What somebody has to mend, by its kind."
        case .cordoned: "1 when this host takes no new guests."
        case .memory: "Memory of the host."
        case .memoryReserved: "Memory that is promised to guests and not taken yet."
        case .memoryFree: "Memory that can still be promised."
        case .pool: "Size of the file system of the image directory."
        case .poolReserved: "Bytes of that file system that are promised to guests on their way."
        case .poolFree: "Bytes of that file system that can still be promised."
        case .evacuationGuests: "Guests of the latest evacuation, by their state."
        case .evacuationRunning: "1 while an evacuation of this host is under way."
        case .evacuationDeadline: "When the evacuation under way begins no guest any more."
        case .certificate: "When the certificate of this host ends."
        case .peerUp: "1 when another host of the fleet answers."
        case .peerRoundTrip: "There and back to another host of the fleet."
        case .peerClock: "How far the clock of another host of the fleet is ahead."
        case .handshakes: "TLS handshakes of the agent as a server, by result."
        case .exportConnections: "Connections that bring disks of guests on their way here."
        case .consoleSessions: "Those who look at consoles of guests here, by kind."
        case .viewers: "Browsers that look at the page."
        case .sessions: "Sessions of the page."
        }
    }
}
