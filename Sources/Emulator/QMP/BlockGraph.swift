/// The block nodes of a running QEMU and how they hang together (`query-named-block-nodes`, `x-debug-query-block-graph`,
/// `query-block`).
public struct BlockGraph: Sendable {
    /// A node.
    public struct Node: Sendable {
        /// Its name.
        public var name: String
        /// Its driver: "qcow2", "file", "nbd".
        public var driver: String
        /// What QEMU calls its file.
        public var file: String
        /// Whether it cannot be written.
        public var isReadOnly: Bool
        /// How many bytes it has.
        public var size: UInt64
        /// How many bytes it takes on its host; nil when QEMU cannot tell.
        public var allocated: UInt64?
        /// Whether its contents are encrypted.
        public var isEncrypted: Bool
        /// The names of its internal snapshots.
        public var snapshots: [String]
        /// Its dirty bitmaps.
        public var bitmaps: [String]
        /// Whether the page cache is bypassed.
        public var isDirect: Bool
        /// Whether flushes are ignored.
        public var ignoresFlush: Bool
        /// "off", "on" or "unmap".
        public var detectZeroes: String
        /// Children by their role.
        public var children: [String: String] = [:]
        /// What QEMU keeps about its format.
        public var specific: JSONValue
    }

    /// The nodes by name.
    public private(set) var nodes: [String: Node] = [:]
    /// The drives and devices with a medium, in QEMU's order.
    public private(set) var drives: [Drive] = []

    /// A drive: what a device, a floppy or a flash chip reads and writes.
    public struct Drive: Sendable {
        /// The name of `-drive`; "" when the device refers to a node.
        public var name: String
        /// The device's QOM path; "" when nothing uses the drive.
        public var device: String
        /// The outermost node; nil for an empty drive.
        public var node: String?
        /// Whether its medium can be changed.
        public var isRemovable = false
    }

    /// Asks QEMU.
    init(_ monitor: QMPClient) async throws {
        for node in try await monitor.execute("query-named-block-nodes", ["flat": true]).array {
            guard let name = node["node-name"]?.string else { continue }
            let image = node["image"]
            nodes[name] = Node(
                name: name,
                driver: node["drv"]?.string ?? "",
                file: node["file"]?.string ?? "",
                isReadOnly: node["ro"]?.bool ?? false,
                size: UInt64(clamping: image?["virtual-size"]?.integer ?? 0),
                allocated: image?["actual-size"]?.integer.map { UInt64(clamping: $0) },
                isEncrypted: node["encrypted"]?.bool ?? false || node["drv"]?.string == "luks",
                snapshots: image?["snapshots"]?.array.compactMap { $0["name"]?.string } ?? [],
                bitmaps: node["dirty-bitmaps"]?.array.compactMap { $0["name"]?.string } ?? [],
                isDirect: node["cache"]?["direct"]?.bool ?? false,
                ignoresFlush: node["cache"]?["no-flush"]?.bool ?? false,
                detectZeroes: node["detect_zeroes"]?.string ?? "off",
                specific: image?["format-specific"]?["data"] ?? .null
            )
        }
        let graph = try await monitor.execute("x-debug-query-block-graph")
        var names: [Int64: String] = [:]
        for node in graph["nodes"]?.array ?? [] where node["type"]?.string == "block-driver" {
            if let id = node["id"]?.integer { names[id] = node["name"]?.string }
        }
        for edge in graph["edges"]?.array ?? [] {
            guard let parent = edge["parent"]?.integer.flatMap({ names[$0] }),
                let child = edge["child"]?.integer.flatMap({ names[$0] }), let role = edge["name"]?.string
            else { continue }
            nodes[parent]?.children[role] = child
        }
        for drive in try await monitor.execute("query-block").array {
            drives.append(
                Drive(
                    name: drive["device"]?.string ?? "",
                    device: drive["qdev"]?.string ?? "",
                    node: drive["inserted"]?["node-name"]?.string,
                    isRemovable: drive["removable"]?.bool ?? false
                )
            )
        }
    }

    private static let filters: Set<String> = [
        "throttle", "copy-on-read", "copy-before-write", "preallocate", "compress", "mirror_top", "commit_top",
        "blkdebug", "blklogwrites", "blkreplay",
    ]

    /// From a node down to its protocol by `file`.
    func chain(from name: String) -> [Node] {
        var chain: [Node] = []
        var next = nodes[name]
        while let node = next, chain.count < 64 {
            chain.append(node)
            next = (node.children["file"] ?? (Self.filters.contains(node.driver) ? node.children["backing"] : nil))
                .flatMap { nodes[$0] }
        }
        return chain
    }

    /// The disk that a node is the outermost one of; nil when there is nothing like a disk.
    func disk(of name: String) -> GuestDisk? {
        let chain = chain(from: name)
        guard let top = chain.first(where: { !Self.filters.contains($0.driver) }), let bottom = chain.last else {
            return nil
        }
        let isFormat = top.name != bottom.name
        var backing: [GuestDisk.Image] = []
        var next = top.children["backing"]
        while let name = next, backing.count < 256 {
            let below = self.chain(from: name)
            guard let image = below.first(where: { !Self.filters.contains($0.driver) }) else { break }
            backing.append(Self.image(image, below.last ?? image))
            next = image.children["backing"]
        }
        let formats = chain.dropLast().filter { !Self.filters.contains($0.driver) }
        var disk = GuestDisk(
            node: top.name,
            protocolNode: bottom.name,
            protocolDriver: bottom.driver,
            path: bottom.file,
            format: isFormat ? top.driver : "raw",
            size: top.size,
            fileSize: bottom.size,
            allocated: bottom.allocated,
            isReadOnly: chain[0].isReadOnly,
            isEncrypted: top.isEncrypted || !(top.specific["encrypt"] ?? .null).object.isEmpty,
            headerSize: top.driver == "luks"
                ? top.specific["payload-offset"]?.integer.map { UInt64(clamping: $0) } : nil,
            backing: backing,
            snapshots: top.snapshots,
            bitmaps: top.bitmaps
        )
        disk.isStacked = formats.count > 1
        if let data = top.children["data-file"].flatMap({ self.chain(from: $0).last }) {
            disk.dataFile = data.file
            disk.allocated = disk.allocated.flatMap { map in data.allocated.map { map + $0 } }
        }
        return disk
    }

    private static func image(_ node: Node, _ bottom: Node) -> GuestDisk.Image {
        .init(
            path: bottom.file,
            format: node.name == bottom.name ? "raw" : node.driver,
            protocolDriver: bottom.driver,
            size: node.size,
            allocated: bottom.allocated
        )
    }
}

extension QMPClient {
    /// The block nodes.
    public func blockGraph() async throws -> BlockGraph { try await BlockGraph(self) }

    /// The disks that have a medium, with the names by which Crossdock calls them.
    ///
    /// A name is that of the drive (`-drive id=`), or of the device (`-device id=`), or `disk` and a number.
    public func disks() async throws -> [GuestDisk] { try await blockGraph().disks }
}

extension BlockGraph {
    /// The disks that have a medium.
    public var disks: [GuestDisk] {
        var names: Set<String> = []
        var disks: [GuestDisk] = []
        for drive in drives {
            guard let node = drive.node, var disk = disk(of: node) else { continue }
            disk.device = drive.device
            let parts = drive.device.split(separator: "/").map(String.init)
            let id = parts.firstIndex(of: "peripheral").flatMap { parts.count > $0 + 1 ? parts[$0 + 1] : nil }
            var name = drive.name.isEmpty ? id ?? disk.node : drive.name
            name = String(
                name.map { $0.isLetter && $0.isASCII || $0.isNumber && $0.isASCII || "._-".contains($0) ? $0 : "-" }
            )
            if name.isEmpty || name.hasPrefix("-") { name = "disk\(disks.count)" }
            while !names.insert(name).inserted { name += "x" }
            disk.name = name
            disks.append(disk)
        }
        return disks
    }
}
