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
    }

    /// How a snapshot is taken.
    public struct Options: Sendable {
        /// Where scratch files are made.
        public var scratchDirectory: String
        /// How long a write of the guest may wait for the scratch file, in seconds, before the snapshot breaks.
        public var timeout = 4
        /// What the names of scratch files begin with: whose they are.
        public var label: String
        /// How many bitmaps of earlier snapshots are kept.
        public var keptBitmaps = 4
        /// Whose the scratch files shall be: the user that QEMU runs as.
        public var owner: UInt32

        /// Makes options.
        public init(scratchDirectory: String, label: String, owner: UInt32) {
            self.label = label
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

    private let options: Options

    private init(_ options: Options) {
        self.options = options
        name = Self.bitmapPrefix + Self.timestamp()
    }

    /// Makes what a snapshot needs, while the guest runs as before.
    ///
    /// - Parameters:
    ///   - disks: which disks; those that no device uses are left out.
    ///   - monitor: the guest's monitor.
    ///   - options: how.
    /// - Throws: `GuestError`, `QMPError`, `FileError` or `ChannelError`; the guest then is as before.
    public static func prepare(
        of disks: [GuestDisk],
        _ monitor: QMPClient,
        _ options: Options
    ) async throws -> FleecingSnapshot {
        // The timeout is in nanoseconds in 32 bits there (fixed in 9.1).
        if options.timeout > 4, !monitor.isAtLeast(9, 1) {
            throw GuestError(
                "QEMU \(monitor.version) takes at most 4 s as the time that a write may wait for the scratch file"
            )
        }
        let snapshot = FleecingSnapshot(options)
        do {
            try await snapshot.prepare(disks.filter { !$0.device.isEmpty }, monitor)
            return snapshot
        } catch {
            await snapshot.remove(monitor)
            throw error
        }
    }

    /// Takes the snapshot that was prepared.
    ///
    /// - Parameters:
    ///   - monitor: the guest's monitor.
    ///   - willPause: is called right before the processors are paused.
    /// - Throws: `GuestError` or `QMPError`; the guest then is as before, but perhaps for a bitmap.
    public func take(_ monitor: QMPClient, willPause: () throws -> Void) async throws {
        do {
            if try await monitor.status() == "running" {
                try willPause()
                let start = ContinuousClock.now
                do {
                    try await monitor.pause()
                    try await insert(monitor)
                    guard try await monitor.status() == "paused" else {
                        throw GuestError("Something else let the guest run while the snapshot was taken")
                    }
                } catch {
                    try await goOn(monitor)
                    throw error
                }
                try await goOn(monitor)
                let parts = (ContinuousClock.now - start).components
                pause = Double(parts.seconds) * 1000 + Double(parts.attoseconds) / 1e15
            } else {
                try await insert(monitor)
            }
        } catch {
            // Nothing has been built on the new bitmap yet.
            let nodes = disks.map(\.disk.node)
            await remove(monitor)
            for node in nodes {
                _ = try? await monitor.execute(
                    "block-dirty-bitmap-remove",
                    ["node": .string(node), "name": .string(name)]
                )
            }
            throw error
        }
        do {
            try await freezeBitmaps(monitor)
        } catch {
            // The new bitmap stays: old ones may have ended already, and it has what came since.
            await remove(monitor)
            throw error
        }
    }

    /// Lets the processors run, again and again if need be; in the end the watchdog does.
    private func goOn(_ monitor: QMPClient) async throws {
        for attempt in 0..<5 {
            if attempt > 0 { await monitor.loop.sleep(for: .milliseconds(200)) }
            if (try? await monitor.resume()) != nil, (try? await monitor.status()) == "running" { return }
        }
        throw GuestError("QEMU does not let the guest run again after the snapshot")
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
    private func prepare(_ wanted: [GuestDisk], _ monitor: QMPClient) async throws {
        let graph = try await monitor.blockGraph()
        let tag = name.suffix(4)
        try DurableFile.makeDirectory(options.scratchDirectory)
        for (index, disk) in wanted.enumerated() {
            guard graph.drives.contains(where: { $0.device == disk.device && $0.node != nil }) else {
                throw GuestError("The disk '\(disk.name)' was detached meanwhile")
            }
            let scratch = "\(options.scratchDirectory)/\(options.label).\(disk.name)-\(name)"
            let fd = open(scratch, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o600)
            guard fd >= 0 else { throw FileError.system("create the scratch file \(scratch)", errno) }
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
                    scratch: scratch
                )
            )
            guard isSized else { throw FileError.system("make the scratch file \(scratch)", number) }
            try await monitor.execute(
                "blockdev-add",
                [
                    "driver": "raw", "node-name": .string(disks[index].target), "discard": "unmap",
                    "file": ["driver": "file", "filename": .string(scratch), "discard": "unmap"],
                ]
            )
        }
    }

    /// Puts the filters in. The new bitmap is there before the filter, so that no write is missed; the old one is ended only
    /// afterwards.
    private func insert(_ monitor: QMPClient) async throws {
        let graph = try await monitor.blockGraph()
        try await monitor.transaction(
            disks.map { disk in
                ("block-dirty-bitmap-add", ["node": .string(disk.disk.node), "name": .string(name)])
            }
        )
        for disk in disks {
            guard let attached = graph.drives.first(where: { $0.device == disk.disk.device })?.node else {
                throw GuestError("The disk '\(disk.disk.name)' was detached meanwhile")
            }
            try await monitor.execute(
                "blockdev-add",
                [
                    "driver": "copy-before-write", "node-name": .string(disk.filter), "file": .string(attached),
                    "target": .string(disk.target), "on-cbw-error": "break-snapshot",
                    "cbw-timeout": .integer(Int64(options.timeout)),
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
    private func freezeBitmaps(_ monitor: QMPClient) async throws {
        let keep = options.keptBitmaps
        for index in disks.indices {
            let node = disks[index].disk.node
            func id(_ name: String) -> JSONValue { ["node": .string(node), "name": .string(name)] }
            let state = try await monitor.execute("query-named-block-nodes", ["flat": true]).array
                .first { $0["node-name"]?.string == node }
            var earlier: [(name: String, isRecording: Bool, granularity: Int64)] = []
            for bitmap in state?["dirty-bitmaps"]?.array ?? [] {
                guard let name = bitmap["name"]?.string, name.hasPrefix(Self.bitmapPrefix), name != self.name else {
                    continue
                }
                earlier.append((name, bitmap["recording"]?.bool ?? false, bitmap["granularity"]?.integer ?? 65536))
            }
            earlier.sort { $0.name < $1.name }
            if !earlier.isEmpty, !earlier.contains(where: \.isRecording) {
                // Nothing has recorded since the last of them ended: they would tell less than the truth.
                try await monitor.transaction(
                    earlier.map { ("block-dirty-bitmap-remove", id($0.name)) }
                )
                continue
            }
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
            try await monitor.transaction(actions)
            // Removing cannot be part of a transaction with merging from it in all versions. One bitmap too many does no harm.
            _ = try? await monitor.transaction(
                earlier.dropLast(max(keep, 1)).map { ("block-dirty-bitmap-remove", id($0.name)) }
            )
            disks[index].bitmaps = try await copies(
                of: earlier.suffix(max(keep, 1)).map { ($0.name, $0.granularity) },
                for: disks[index],
                monitor
            )
        }
    }

    /// Copies bitmaps to the node of the snapshot, which nobody resizes: QEMU aborts, with the guest, when a disk is resized while
    /// one of its bitmaps is exported (`bdrv_dirty_bitmap_truncate`). The copies go with the node.
    private func copies(of bitmaps: [(name: String, granularity: Int64)], for disk: Disk, _ monitor: QMPClient)
        async throws
        -> [(node: String, name: String)]
    {
        for (name, granularity) in bitmaps {
            try await monitor.execute(
                "block-dirty-bitmap-add",
                [
                    "node": .string(disk.node), "name": .string(name), "granularity": .integer(granularity),
                    "disabled": true,
                ]
            )
            try await monitor.execute(
                "block-dirty-bitmap-merge",
                [
                    "node": .string(disk.node), "target": .string(name),
                    "bitmaps": [["node": .string(disk.disk.node), "name": .string(name)]],
                ]
            )
        }
        return bitmaps.map { (disk.node, $0.name) }
    }

    /// Takes everything out of the guest but the bitmaps, and removes the scratch files.
    ///
    /// - Returns: what could not be taken out.
    @discardableResult
    public func remove(_ monitor: QMPClient) async -> [String] {
        guard !disks.isEmpty else { return [] }
        let left = await Self.takeOut(monitor) { name in
            self.disks.contains { name == $0.node || name == $0.filter || name == $0.target }
        }
        for disk in disks where !left.contains(disk.target) { unlink(disk.scratch) }
        disks = []
        return left
    }

    /// Removes the scratch files of a guest that has ended.
    public func discard() {
        for disk in disks { unlink(disk.scratch) }
        disks = []
    }

    /// Takes nodes out of a guest. A device that has one of our filters gets what is below the filter now: the guest may
    /// have another image there than it had when the filter was put in.
    ///
    /// - Returns: the nodes that are still there.
    private static func takeOut(_ monitor: QMPClient, _ isOurs: (String) -> Bool) async -> [String] {
        guard let before = try? await monitor.blockGraph() else { return [] }
        let own = before.nodes.values.filter { isOurs($0.name) }
        for node in own where node.driver == "snapshot-access" { _ = try? await monitor.removeNode(node.name) }
        guard let graph = try? await monitor.blockGraph() else { return own.map(\.name) }
        for drive in graph.drives {
            guard let name = drive.node, isOurs(name), let below = graph.nodes[name]?.children["file"] else { continue }
            _ = try? await monitor.attach(below, to: drive.device)
        }
        for driver in ["copy-before-write", ""] {
            for node in own where driver.isEmpty ? node.driver != "snapshot-access" : node.driver == driver {
                _ = try? await monitor.removeNode(node.name)
            }
        }
        let after = try? await monitor.blockGraph()
        return own.map(\.name).filter { after?.nodes[$0] != nil || after == nil }
    }

    /// Takes out what an export that was killed has left in a guest. Nobody else may be exporting the guest.
    ///
    /// - Parameters:
    ///   - monitor: the guest's monitor.
    ///   - label: whose scratch files are removed.
    ///   - directories: where scratch files are.
    public static func clear(_ monitor: QMPClient, label: String, directories: [String]) async throws {
        for export in try await monitor.blockExports() where export.id.hasPrefix(prefix) {
            try await monitor.removeNBDExport(export.id)
        }
        let left = await takeOut(monitor) { $0.hasPrefix(prefix) }
        guard left.isEmpty else {
            throw GuestError(
                "An earlier export has left nodes in the guest that QEMU does not let go: \(left.joined(separator: ", "))"
            )
        }
        for directory in directories {
            for name in DurableFile.list(directory)
            where name.hasPrefix("\(label).") && name.contains("-\(bitmapPrefix)") {
                unlink("\(directory)/\(name)")
            }
        }
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
