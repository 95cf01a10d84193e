public import Emulator
internal import FoundationEssentials
internal import IO

/// How a migration went; `docs/report.md` describes the JSON.
public struct MigrationReport: Sendable, Codable {
    /// How it ended.
    public enum Outcome: String, Sendable, Codable {
        /// The guest runs on the destination.
        case migrated
        /// The guest runs on the source, as if nothing had happened.
        case rolledBack = "rolled-back"
        /// The release was sent and not confirmed.
        case undecided
        /// An operator of the destination has taken the guest for that host, without the source's word.
        case overruled
        /// The rehearsal went well; nothing was moved.
        case rehearsed
    }

    /// One disk.
    public struct Disk: Sendable, Codable {
        /// Its name.
        public var name: String
        /// Its size in bytes.
        public var size: UInt64
        /// Payload bytes sent as data.
        public var bytesSent: UInt64
        /// What those bytes were on the line; nil where they were not compressed.
        public var bytesOnLine: UInt64?
        /// Bytes sent as zeroes.
        public var zeroBytes: UInt64
        /// Bytes that were not sent, since the destination had them already; nil when it was not begun with an image.
        public var seededBytes: UInt64?
        /// The digest of the source's image, read after the release.
        public var digestSource: String?
        /// The digest that the destination read back from its image.
        public var digestDestination: String?

        /// Makes a disk.
        public init(name: String, size: UInt64) {
            self.name = name
            self.size = size
            bytesSent = 0
            zeroBytes = 0
        }

        private enum CodingKeys: String, CodingKey {
            case name, size
            case bytesSent = "bytes_sent"
            case bytesOnLine = "bytes_on_line"
            case zeroBytes = "zero_bytes"
            case seededBytes = "seeded_bytes"
            case digestSource = "digest_source"
            case digestDestination = "digest_destination"
        }
    }

    /// What protected the bytes between the agents.
    public struct TLS: Sendable, Codable {
        /// "1.3"
        public var version: String
        /// "AES-128-GCM"
        public var cipher: String
        /// How many connections were opened.
        public var connections: Int

        /// Makes a description.
        public init(version: String, cipher: String, connections: Int) {
            self.version = version
            self.cipher = cipher
            self.connections = connections
        }
    }

    /// How a blank copy of the guest moved, and what was measured on the way.
    public struct Rehearsal: Sendable, Codable {
        /// How long it took, in milliseconds.
        public var milliseconds = 0.0
        /// Bytes that it sent.
        public var bytes: UInt64 = 0
        /// There and back, in milliseconds.
        public var roundTripMS = 0.0
        /// What one connection carried, in bytes per second.
        public var bytesPerSecond = 0.0
        /// QEMU's version on the source.
        public var emulatorHere = ""
        /// QEMU's version on the destination.
        public var emulatorThere = ""
        /// How far the source's clock is ahead, in milliseconds.
        public var clockSkewMS = 0.0
        /// Free bytes in the destination's image directory.
        public var freeBytes: UInt64 = 0
        /// How the command line changes.
        public var changes: [String] = []
        /// Bytes of the disks that are in use.
        public var diskBytes: UInt64 = 0
        /// Bytes of the disks if all of them were in use.
        public var diskBytesAtMost: UInt64 = 0
        /// Bytes of memory.
        public var memoryBytes: UInt64 = 0
        /// Bytes of memory that the guest has ever used, at most: the rest costs nothing; nil when that is not known.
        public var memoryBytesInUse: UInt64?
        /// Bytes of memory that the guest changed in a second; only with `--dry-run`.
        public var memoryDirtyRate: Double?
        /// Bytes that the guest wrote to its disks in a second; only with `--dry-run`.
        public var diskWriteRate: Double?
        /// How long a migration would take, in seconds; nil when it might not converge.
        public var secondsEstimated: Double?

        /// Makes an empty one.
        public init() {}

        private enum CodingKeys: String, CodingKey {
            case milliseconds = "ms"
            case bytes, changes
            case roundTripMS = "round_trip_ms"
            case bytesPerSecond = "bytes_per_second"
            case emulatorHere = "qemu_source"
            case emulatorThere = "qemu_destination"
            case clockSkewMS = "clock_skew_ms"
            case freeBytes = "free_bytes"
            case diskBytes = "disk_bytes"
            case diskBytesAtMost = "disk_bytes_at_most"
            case memoryBytes = "memory_bytes"
            case memoryBytesInUse = "memory_bytes_in_use"
            case memoryDirtyRate = "memory_dirty_rate"
            case diskWriteRate = "disk_write_rate"
            case secondsEstimated = "seconds_estimated"
        }
    }

    /// The migration's id.
    public var migration: String
    /// The guest's name.
    public var guest: String
    /// Where it went or should have gone.
    public var destination: String
    /// How it ended.
    public var outcome: Outcome
    /// Why it did not end well.
    public var reason: String?
    /// What checks have found against the guest, each by itself; nil when that is not why.
    public var obstacles: [Obstacle]?
    /// The exit code.
    public var code: Int32
    /// The disks.
    public var disks: [Disk]
    /// Bytes of the disks that were sent in the phase `disks`; nil when it did not come to an end.
    public var copiedBytes: UInt64?
    /// Bytes of the memory stream.
    public var ramBytesSent: UInt64
    /// What those bytes were on the line, where they might be compressed; nil where not.
    public var ramBytesOnLine: UInt64?
    /// Bytes of memory that QEMU got to remember pages, of which it then sent what had changed (XBZRLE); nil when it sent them whole.
    public var deltaCacheBytes: UInt64?
    /// How long each phase took, in milliseconds.
    public var phasesMS: [String: Double]
    /// From the source's STOP to the destination's OWNED, by the source's clock: an upper bound of the pause.
    public var blackoutMS: Double?
    /// What the guest was doing when it moved, if it did not run: it does the same on the destination.
    public var guestState: RunState?
    /// Whether it was switched off, and is so on the destination; nil when it was not.
    public var isOff: Bool?
    /// All of it, in milliseconds.
    public var totalMS: Double
    /// The protection; nil when no connection came about.
    public var tls: TLS?
    /// The rehearsal; nil when it did not come to that.
    public var rehearsal: Rehearsal?
    /// How often a lost connection was opened again.
    public var reconnects: Int
    /// Bytes that were sent twice because of that.
    public var bytesResent: UInt64

    /// Whether it was ended by the watchdog or by `crossdock recover` after its source agent had died, which took with it what it had counted
    /// and measured: counts and times of before are 0 or missing. Nil when the source agent has ended it.
    public var isRecovered: Bool?

    /// Makes a report of a migration that has just begun.
    public init(migration: String, guest: String, destination: String) {
        self.migration = migration
        self.guest = guest
        self.destination = destination
        outcome = .rolledBack
        code = 0
        disks = []
        ramBytesSent = 0
        phasesMS = [:]
        totalMS = 0
        reconnects = 0
        bytesResent = 0
    }

    private enum CodingKeys: String, CodingKey {
        case migration, guest, destination, outcome, reason, obstacles, code, disks, tls, rehearsal, reconnects
        case copiedBytes = "copied_bytes"
        case ramBytesSent = "ram_bytes_sent"
        case ramBytesOnLine = "ram_bytes_on_line"
        case deltaCacheBytes = "delta_cache_bytes"
        case phasesMS = "phases_ms"
        case blackoutMS = "blackout_ms"
        case guestState = "guest_state"
        case isOff = "off"
        case totalMS = "total_ms"
        case bytesResent = "bytes_resent"
        case isRecovered = "recovered"
    }

    /// The report as JSON text.
    public var json: String {
        guard let data = try? JSONText.encode(self, pretty: true) else { return "{}" }
        return String(decoding: data, as: UTF8.self) + "\n"
    }

    /// Reads a report.
    public init(parsing bytes: [UInt8]) throws {
        self = try JSONDecoder().decode(MigrationReport.self, from: Data(bytes))
    }
}
