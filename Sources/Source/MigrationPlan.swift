public import IO
internal import Migration

/// What `crossdock migrate` was asked to do: everything that a source agent needs.
public struct MigrationPlan: Sendable, Codable {
    /// The migration's id.
    public var id: String
    /// The guest's name.
    public var guest: String
    /// The destination's host name or address; its certificate must be for it.
    public var host: String
    /// The destination's control port.
    public var port: UInt16
    /// Where guests and migrations are recorded on this host.
    public var stateDirectory: String
    /// NBD connections for each disk, at most.
    public var connections: Int
    /// Bytes per second for disks and for memory; 0 for no limit.
    public var bandwidth: UInt64
    /// The pause to aim at, in milliseconds.
    public var downtimeLimit: Int
    /// By how many percent of its time the guest may be slowed down so that its memory gets through, 0 to 99; nil for as much as it takes.
    public var slowDownLimit: Int?
    /// When a pause is given up and the guest resumed on the source, in milliseconds.
    public var blackoutDeadline: Int
    /// How long the source's images are kept, in seconds.
    public var keepSource: Int
    /// The monitor of a running QEMU that is to be adopted; nil for a guest that is known.
    public var monitor: String?
    /// The format of the images at the destination; nil for that of the source.
    public var format: String?
    /// How long an outage of the link or the destination is waited for, in seconds.
    public var patience = 300
    /// How many bytes each disk's mirror keeps in memory at most.
    public var mirrorMemory = MigrationPlan.usualMirrorMemory
    /// Whether what is sent is compressed.
    public var compression = Compression.auto
    /// Whether both sides read all of each disk, with the guest paused, before it is released.
    public var verifiesFully = false
    /// The destination's images that disks are begun with, by the disk's name; that of a guest with one disk may be empty.
    public var seeds: [String: String]?
    /// The destination's bridges that take the place of those here; nil for none.
    public var networks: NetworkMap?
    /// Whether only the rehearsal is wanted.
    public var isRehearsal = false
    /// The room that the destination keeps for the guest; nil when none was reserved.
    public var reservation: String?
    /// The evacuation that the migration belongs to: its switchover waits until no other guest has its own; nil for a migration by itself.
    public var evacuation: String?
    /// How many guests of the evacuation may be copied at once; nil for a migration by itself.
    public var copyPlaces: Int?
    /// Who the destination must prove to be, besides having a certificate for its host; nil for anybody whom the credentials trust.
    public var identity: String?

    /// Makes a plan with the defaults.
    public init(id: String, guest: String, host: String, port: UInt16, stateDirectory: String) {
        self.id = id
        self.guest = guest
        self.host = host
        self.port = port
        self.stateDirectory = stateDirectory
        connections = MigrationPlan.usualConnectionsAtMost
        bandwidth = 0
        downtimeLimit = 300
        blackoutDeadline = 10_000
        keepSource = 7 * 86400
    }

    /// The limit of QEMU (`max-cpu-throttle`).
    public static let mostSlowDown = 99
    /// By how many percent of its time the guest may be slowed down.
    var mostSlowDown: Int { slowDownLimit ?? Self.mostSlowDown }

    /// How many bytes a disk's mirror keeps in memory at most: what a line of 5 Gbit/s and 100 ms takes. Others take less.
    public static let usualMirrorMemory = 512 << 20

    /// How many connections a disk may have that its operator says nothing of.
    public static let usualConnectionsAtMost = 16
    /// How many all disks of a guest may have beyond those that they begin with.
    private static let connectionsOfGuest = 64

    /// How many connections each disk begins with.
    public var firstConnections: Int { min(max(connections, 1), DescriptorBudget.usualConnections) }

    /// How many connections each of so many disks may have.
    func connections(disks: Int) -> Int {
        max(firstConnections, min(connections, Self.connectionsOfGuest / max(disks, 1)))
    }

    /// The destination's control port.
    public var address: SocketAddress { .inet(host: host, port: port) }
}
