internal import IO
public import Source

/// The agent that a web server is the face of: what it tells, and what it does on request. The executable fills it in.
public struct WebHost: Sendable {
    /// How much of something there is, in bytes.
    public struct Amount: Sendable, Hashable, Encodable {
        /// All of it.
        public var total: UInt64
        /// What is taken.
        public var used: UInt64
        /// What is promised to guests and not taken yet.
        public var reserved: UInt64
        /// What could still be promised.
        public var free: UInt64

        /// Makes an amount of what is there, what of it is available, and what of that is promised.
        public init(total: UInt64, available: UInt64, promised: UInt64) {
            self.total = total
            used = total - min(available, total)
            reserved = min(promised, available)
            free = available - reserved
        }
    }

    /// What the agent says of its host now.
    public struct Figures: Sendable, Hashable {
        /// The memory.
        public var memory: Amount
        /// The file system of the image directory.
        public var disk: Amount

        /// Makes figures.
        public init(memory: Amount, disk: Amount) {
            self.memory = memory
            self.disk = disk
        }
    }

    /// A host of the fleet, as it is seen from here.
    public struct Peer: Sendable, Hashable, Encodable {
        /// Its name.
        public var name: String
        /// Where its agent is asked: HOST:PORT.
        public var address: String
        /// Whether it answers; nil when it was not asked yet.
        public var up: Bool?
        /// There and back, in milliseconds.
        public var roundTripMS: Double?
        /// How far its clock is ahead of this host's, in milliseconds, to within half a round trip.
        public var clockOffsetMS: Double?
        /// Why it does not answer.
        public var error: String?

        /// Names a host that was not asked yet.
        public init(name: String, address: String) {
            self.name = name
            self.address = address
        }

        private enum CodingKeys: String, CodingKey {
            case name, address, up, error
            case roundTripMS = "round_trip_ms"
            case clockOffsetMS = "clock_offset_ms"
        }
    }

    /// What has come of guests on their way here, since the agent began.
    public struct Traffic: Sendable, Hashable {
        var exportConnections: Int
        var diskBytes: UInt64
        var memoryBytes: UInt64

        /// Describes it.
        ///
        /// - Parameters:
        ///   - exportConnections: connections that bring disks now.
        ///   - diskBytes: bytes of disks.
        ///   - memoryBytes: bytes of memory.
        public init(exportConnections: Int, diskBytes: UInt64, memoryBytes: UInt64) {
            self.exportConnections = exportConnections
            (self.diskBytes, self.memoryBytes) = (diskBytes, memoryBytes)
        }
    }

    /// The host's name.
    public var name: String
    /// The release of the program.
    public var version: String
    /// Where its agent takes guests.
    public var address: String
    /// The state directory.
    public var stateDirectory: String
    /// Where images are made.
    public var imageDirectory: String
    /// The directory of the host's certificates; nil when it has none of `tls-creds-x509`.
    public var credentials: String?
    /// Tells what the host has; nil when it cannot be said.
    public var figures: @Sendable () async -> Figures? = { nil }
    /// Tells what has come of guests on their way here; nil when it cannot be said.
    public var traffic: @Sendable () async -> Traffic? = { nil }
    /// Asks the other hosts of the fleet; empty for a host of none. Each is asked for some seconds at most.
    public var peers: @Sendable () async -> [Peer] = { [] }
    /// Begins to move a guest to another host, and returns the migration's id. Blocks. It throws an error with a sentence.
    public var move: (@Sendable (_ guest: String, _ target: EvacuationOrder.Target) throws -> String)?

    /// Opens consoles on the hosts to which guests have gone; nil for an agent that passes none on.
    public var openConsole: OpenRemoteConsole?
    /// How long a host is asked again that does not pass a console on, before readers are sent there.
    public var consolePatience = Duration.seconds(60)

    /// Names a host.
    public init(
        name: String,
        version: String,
        address: String,
        stateDirectory: String,
        imageDirectory: String,
        credentials: String?
    ) {
        self.name = name
        self.version = version
        self.address = address
        self.stateDirectory = stateDirectory
        self.imageDirectory = imageDirectory
        self.credentials = credentials
    }
}
