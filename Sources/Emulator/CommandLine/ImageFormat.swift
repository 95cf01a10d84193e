/// What is known of each format of disk images, and of the protocols and filters that a disk may consist of.
public enum ImageFormat: String, Sendable, CaseIterable {
    case raw
    case qcow2
    case qed
    case luks
    case vdi
    case vmdk
    case vpc
    case vhdx

    /// Whether images in it are made on a destination and filled by the mirror.
    public var isCarried: Bool { [.raw, .qcow2, .qed, .luks].contains(self) }

    /// Whether a file in it that the guest only reads can be taken along: it refers to no other file, or its header shows that it
    /// does not.
    public var isCarriedReadOnly: Bool { [.raw, .qcow2, .luks].contains(self) }

    /// Whether it can lie on the network: what is there is changed by others, so it must not be able to name files at all.
    var isReadFromNetwork: Bool { [.raw, .luks].contains(self) }

    /// Whether a name of a format is one that a destination makes.
    public static func isCarried(_ name: String) -> Bool { ImageFormat(rawValue: name)?.isCarried ?? false }

    /// What disks on this host are at the bottom.
    static let localProtocols: Set<String> = ["file", "host_device", "host_cdrom"]
    /// What disks on the network are at the bottom.
    static let networkProtocols: Set<String> = [
        "nbd", "http", "https", "ftp", "ftps", "iscsi", "rbd", "ssh", "nfs", "gluster",
    ]
    /// Disks that hold nothing.
    static let emptyProtocols: Set<String> = ["null-co", "null-aio"]
    /// What may lie between a device and a format, or a format and its file.
    static let filters: Set<String> = ["throttle", "copy-on-read", "preallocate"]

    /// Whether a disk of a guest may have a node of this kind.
    static func isKnown(driver: String) -> Bool {
        ImageFormat(rawValue: driver) != nil || localProtocols.contains(driver) || networkProtocols.contains(driver)
            || emptyProtocols.contains(driver) || filters.contains(driver)
    }
}
