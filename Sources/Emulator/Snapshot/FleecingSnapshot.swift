internal import FoundationEssentials
internal import Glibc
internal import IO

/// A point in time of a running guest's disks, for as long as somebody reads it.
///
/// Before the guest overwrites something, QEMU copies it to a scratch file; the snapshot reads from both
/// (`copy-before-write`, `snapshot-access`). When the scratch file is full or too slow the snapshot breaks, and the guest goes
/// on. All disks are of the same moment: the processors are paused while the filters are put in.
///
/// Confined to the monitor's loop.
public final class FleecingSnapshot: @unchecked Sendable {
    // Unchecked: confined to the monitor's loop.

    /// One disk of it.
    public struct Disk: Sendable {
        /// The disk as it is.
        public let disk: GuestDisk
        /// The node that shows the point in time.
        public let node: String
        /// The bitmaps that tell what has changed until then, with the node that has them.
        public fileprivate(set) var bitmaps: [(node: String, name: String)]
        fileprivate let filter: String
        fileprivate let target: String
        fileprivate let scratch: String
        /// What the device was attached to.
        fileprivate let attached: String
    }

    /// How a snapshot is taken.
    public struct Options: Sendable {
        /// Where scratch files are made.
        public var scratchDirectory: String
        /// How long a write of the guest may wait for the scratch file, in seconds, before the snapshot breaks.
        public var timeout = 5
        /// How many bitmaps of earlier snapshots are kept.
        public var keptBitmaps = 4
        /// Whose the scratch files shall be: the user that QEMU runs as.
        public var owner: UInt32

        /// Makes options.
        public init(scratchDirectory: String, owner: UInt32) {
            self.scratchDirectory = scratchDirectory
            self.owner = owner
        }
    }

    /// The name of the bitmap that begins with this snapshot: what the next one calls "since this one".
    public let name: String
    /// The disks.
    public private(set) var disks: [Disk] = []
    /// How long the processors were paused, in milliseconds.
    public private(set) var pause = 0.0

    /// What the names of everything begin with that Crossdock puts into a guest for an export.
    static let prefix = "xde-"
    /// What the names of its bitmaps begin with.
    public static let bitmapPrefix = "crossdock-"

    private init(name: String) { self.name = name }

    /// Takes a snapshot.
    ///
    /// - Parameters:
    ///   - disks: which disks.
    ///   - monitor: the guest's monitor.
    ///   - options: how.
    /// - Throws: `GuestError`, `QMPError` or `ChannelError`; the guest then is as before.
    public static func take(
        of disks: [GuestDisk],
        _ monitor: QMPClient,
        _ options: Options
    ) async throws -> FleecingSnapshot {
        let snapshot = FleecingSnapshot(name: bitmapPrefix + timestamp())
        do {
            try await snapshot.prepare(disks, monitor, options)
            let wasRunning = try await monitor.status() == "running"
            let start = ContinuousClock.now
            if wasRunning { try await monitor.pause() }
            do {
                try await snapshot.insert(monitor)
            } catch {
                if wasRunning { try? await monitor.resume() }
                throw error
            }
            if wasRunning { try await monitor.resume() }
            let parts = (ContinuousClock.now - start).components
            snapshot.pause = Double(parts.seconds) * 1000 + Double(parts.attoseconds) / 1e15
            try await snapshot.freezeBitmaps(monitor, keep: options.keptBitmaps)
            return snapshot
        } catch {
            let nodes = snapshot.disks.map(\.disk.node)
            await snapshot.remove(monitor)
            for node in nodes {
                _ = try? await monitor.execute(
                    "block-dirty-bitmap-remove",
                    ["node": .string(node), "name": .string(snapshot.name)]
                )
            }
            throw error
        }
    }

    private static func timestamp() -> String {
        var now = time(nil)
        var parts = tm()
        gmtime_r(&now, &parts)
        func two(_ number: Int32) -> String { number < 10 ? "0\(number)" : "\(number)" }
        let random = (0..<2).map { _ in String(UInt8.random(in: 16...255), radix: 16) }.joined()
        return "\(parts.tm_year + 1900)\(two(parts.tm_mon + 1))\(two(parts.tm_mday))T\(two(parts.tm_hour))"
            + "\(two(parts.tm_min))\(two(parts.tm_sec))Z-\(random)"
    }

    /// Everything that does not need the guest to be paused: scratch files and the new bitmaps.
    private func prepare(_ wanted: [GuestDisk], _ monitor: QMPClient, _ options: Options) async throws {
        let graph = try await monitor.blockGraph()
        let tag = name.suffix(4)
        try DurableFile.makeDirectory(options.scratchDirectory)
        for (index, disk) in wanted.enumerated() {
            guard let drive = graph.drives.first(where: { $0.device == disk.device }), let attached = drive.node else {
                throw GuestError("The disk '\(disk.name)' was detached meanwhile")
            }
            let scratch = "\(options.scratchDirectory)/\(disk.name)-\(name)"
            let fd = open(scratch, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o600)
            guard fd >= 0 else { throw ChannelError.system("create the scratch file \(scratch)", errno) }
            let isSized = ftruncate(fd, off_t(disk.size)) == 0
            let number = errno
            if geteuid() == 0 { fchown(fd, options.owner, gid_t.max) }
            close(fd)
            disks.append(
                Disk(
                    disk: disk,
                    node: "\(Self.prefix)a\(index)-\(tag)",
                    bitmaps: [],
                    filter: "\(Self.prefix)c\(index)-\(tag)",
                    target: "\(Self.prefix)s\(index)-\(tag)",
                    scratch: scratch,
                    attached: attached
                )
            )
            guard isSized else { throw ChannelError.system("make the scratch file \(scratch)", number) }
            try await monitor.execute(
                "blockdev-add",
                [
                    "driver": "raw", "node-name": .string(disks[index].target), "discard": "unmap",
                    "file": ["driver": "file", "filename": .string(scratch), "discard": "unmap"],
                ]
            )
        }
        timeout = options.timeout
    }

    private var timeout = 5

    /// Puts the filters in. The new bitmap is there before the filter, so that no write is missed; the old one is ended only
    /// afterwards.
    private func insert(_ monitor: QMPClient) async throws {
        try await monitor.transaction(
            disks.map { disk in
                ("block-dirty-bitmap-add", ["node": .string(disk.disk.node), "name": .string(name)])
            }
        )
        for disk in disks {
            try await monitor.execute(
                "blockdev-add",
                [
                    "driver": "copy-before-write", "node-name": .string(disk.filter), "file": .string(disk.attached),
                    "target": .string(disk.target), "on-cbw-error": "break-snapshot",
                    "cbw-timeout": .integer(Int64(timeout)),
                ]
            )
            // The filter wants the disk for itself once somebody uses the filter: the guest goes first.
            try await monitor.attach(disk.filter, to: disk.disk.device)
            try await monitor.execute(
                "blockdev-add",
                ["driver": "snapshot-access", "node-name": .string(disk.node), "file": .string(disk.filter)]
            )
        }
    }

    /// Ends the bitmaps of the snapshot before, whose changes all earlier ones get, too.
    private func freezeBitmaps(_ monitor: QMPClient, keep: Int) async throws {
        for index in disks.indices {
            let node = disks[index].disk.node
            let state = try await monitor.execute("query-named-block-nodes", ["flat": true]).array
                .first { $0["node-name"]?.string == node }
            var earlier: [(name: String, isRecording: Bool)] = []
            for bitmap in state?["dirty-bitmaps"]?.array ?? [] {
                guard let name = bitmap["name"]?.string, name.hasPrefix(Self.bitmapPrefix), name != self.name else {
                    continue
                }
                earlier.append((name, bitmap["recording"]?.bool ?? false))
            }
            earlier.sort { $0.name < $1.name }
            func id(_ name: String) -> JSONValue { ["node": .string(node), "name": .string(name)] }
            var actions: [(String, JSONValue)] = []
            for bitmap in earlier where bitmap.isRecording {
                actions.append(("block-dirty-bitmap-disable", id(bitmap.name)))
                for target in earlier where !target.isRecording {
                    actions.append(
                        (
                            "block-dirty-bitmap-merge",
                            ["node": .string(node), "target": .string(target.name), "bitmaps": [.string(bitmap.name)]]
                        )
                    )
                }
            }
            for old in earlier.dropLast(max(keep, 1)) { actions.append(("block-dirty-bitmap-remove", id(old.name))) }
            // Removing cannot be part of a transaction with merging from it in all versions, so the order decides.
            let removals = actions.filter { $0.0 == "block-dirty-bitmap-remove" }
            try await monitor.transaction(actions.filter { $0.0 != "block-dirty-bitmap-remove" })
            try await monitor.transaction(removals)
            disks[index].bitmaps = earlier.suffix(max(keep, 1)).map { (node, $0.name) }
        }
    }

    /// Takes everything out of the guest but the bitmaps, and removes the scratch files.
    public func remove(_ monitor: QMPClient) async {
        for disk in disks {
            _ = try? await monitor.removeNode(disk.node)
            _ = try? await monitor.attach(disk.attached, to: disk.disk.device)
            _ = try? await monitor.removeNode(disk.filter)
            _ = try? await monitor.removeNode(disk.target)
            unlink(disk.scratch)
        }
        disks = []
    }

    /// Takes out what an export that was killed has left in a guest.
    ///
    /// - Returns: whether there was anything.
    @discardableResult
    public static func clear(_ monitor: QMPClient) async throws -> Bool {
        var found = false
        let exports = try await monitor.blockExports()
        for export in exports where export.id.hasPrefix(prefix) {
            try await monitor.removeNBDExport(export.id)
            found = true
        }
        if found, exports.allSatisfy({ $0.id.hasPrefix(prefix) }) { _ = try? await monitor.stopNBDServer() }
        let graph = try await monitor.blockGraph()
        let own = graph.nodes.values.filter { $0.name.hasPrefix(prefix) }
        for node in own where node.driver == "snapshot-access" { _ = try? await monitor.removeNode(node.name) }
        for drive in graph.drives {
            guard let name = drive.node, name.hasPrefix(prefix), let below = graph.nodes[name]?.children["file"] else {
                continue
            }
            try await monitor.attach(below, to: drive.device)
        }
        for node in own where node.driver == "copy-before-write" { _ = try? await monitor.removeNode(node.name) }
        for node in own where !["snapshot-access", "copy-before-write"].contains(node.driver) {
            _ = try? await monitor.removeNode(node.name)
            if node.name.hasPrefix("\(prefix)s") { unlink(node.file) }
        }
        return found || !own.isEmpty
    }

    /// Whether a bitmap of QEMU is one of a snapshot's.
    public static func isOwn(bitmap name: String) -> Bool { name.hasPrefix(bitmapPrefix) }
}

extension QMPClient {
    /// Lets a device read and write another node (`qom-set`, `drive`).
    func attach(_ node: String, to device: String) async throws {
        // The property belongs to the device that was given, not to the part that does the work.
        let suffix = "/virtio-backend"
        let path = device.hasSuffix(suffix) ? String(device.dropLast(suffix.count)) : device
        try await execute(
            "qom-set",
            ["path": .string(path), "property": "drive", "value": .string(node)]
        )
    }
}
