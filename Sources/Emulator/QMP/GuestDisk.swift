/// A disk of a running guest.
public struct GuestDisk: Sendable, Hashable, Codable {
    /// An image under a disk.
    public struct Image: Sendable, Hashable, Codable {
        /// The file or device.
        public var path: String
        /// The format: "raw", "qcow2".
        public var format: String
        /// What reads it: "file", "host_device", "nbd".
        public var protocolDriver: String
        /// How many bytes it shows.
        public var size: UInt64
        /// How many bytes it takes on its host; nil when QEMU cannot tell.
        public var allocated: UInt64?
    }

    /// The name by which Crossdock calls it: the drive's or the device's.
    public var name = ""
    /// What block jobs call it: the name of the node with its contents, below any filter.
    public var node: String
    /// The node at the bottom.
    public var protocolNode: String
    /// What reads it: "file", "host_device", "nbd".
    public var protocolDriver: String
    /// The file or device at the bottom, or QEMU's name of what it is on the network.
    public var path: String
    /// The format on top: "raw", "qcow2".
    public var format: String
    /// How many bytes the guest sees.
    public var size: UInt64
    /// How many bytes the file or device at the bottom has.
    public var fileSize: UInt64
    /// How many bytes it takes on its host; nil when QEMU cannot tell.
    public var allocated: UInt64?
    /// Whether the guest cannot write it.
    public var isReadOnly: Bool
    /// Whether it cannot be read without a secret.
    public var isEncrypted: Bool
    /// How many bytes at the beginning of an encrypted container are not the guest's: its keys.
    public var headerSize: UInt64?
    /// The images under it, the nearest first.
    public var backing: [Image]
    /// Names of internal snapshots.
    public var snapshots: [String]
    /// Names of its dirty bitmaps.
    public var bitmaps: [String]
    /// The device's QOM path.
    public var device = ""

    /// The file with its data, where a qcow2 image has only the map; nil for others.
    public var dataFile: String?

    /// Whether a format lies within another one, as qcow2 within LUKS.
    public var isStacked = false

    /// Whether its contents are on another machine that every host reaches in the same way.
    public var isNetwork: Bool {
        ["nbd", "iscsi", "http", "https", "ftp", "ftps", "rbd", "ssh", "nfs", "gluster"].contains(protocolDriver)
    }
    /// Whether its contents are in a file or a device of this host.
    public var isLocal: Bool { ["file", "host_device", "host_cdrom"].contains(protocolDriver) }
    /// Whether it takes no space and holds nothing.
    public var isNull: Bool { protocolDriver.hasPrefix("null-") }
}
