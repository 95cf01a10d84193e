/// The state of a block job (`query-jobs`, `query-block-jobs`).
public struct BlockJob: Sendable {
    /// "running", "ready", "concluded".
    public var status: String
    /// How far it is.
    public var current: UInt64
    /// How far it has to go; grows while the guest writes.
    public var total: UInt64
    /// Why it failed.
    public var error: String?
}

extension QMPClient {
    /// Attaches an NBD export on a Unix socket as a node (`blockdev-add`).
    ///
    /// - Parameters:
    ///   - name: the node's name.
    ///   - socket: where the server listens.
    ///   - export: the export.
    ///   - mayBeEmptied: whether holes may be made there. A mirror of a whole disk begins by zeroing a target of which that is so (QEMU's
    ///     `mirror_dirty_init`), and copies to any other one chunk by chunk, what is zero too.
    public func addNBDNode(_ name: String, socket: String, export: String, mayBeEmptied: Bool = true) async throws {
        try await execute(
            "blockdev-add",
            [
                "driver": "nbd",
                "node-name": .string(name),
                "server": ["type": "unix", "path": .string(socket)],
                "export": .string(export),
                "discard": mayBeEmptied ? "unmap" : "ignore",
            ]
        )
    }

    /// Removes a node (`blockdev-del`).
    public func removeNode(_ name: String) async throws {
        try await execute("blockdev-del", ["node-name": .string(name)])
    }

    /// Starts copying a disk and everything the guest writes to it (`blockdev-mirror`).
    ///
    /// - Parameters:
    ///   - job: the job's name.
    ///   - node: the disk.
    ///   - target: the node to copy to.
    ///   - sync: "full", or "top" for what is above the backing image only.
    ///   - speed: bytes per second; 0 for no limit.
    ///   - buffer: the most that is under way, in bytes; nil for QEMU's own.
    public func mirror(
        job: String,
        node: String,
        target: String,
        sync: String = "full",
        speed: UInt64,
        buffer: UInt64? = nil
    ) async throws {
        var arguments: [String: JSONValue] = [
            "job-id": .string(job),
            "device": .string(node),
            "target": .string(target),
            "sync": .string(sync),
            "copy-mode": "background",
            "auto-dismiss": false,
            "on-target-error": "report",
            "on-source-error": "report",
            "speed": .integer(Int64(speed)),
        ]
        if let buffer { arguments["buf-size"] = .integer(Int64(buffer)) }
        try await execute("blockdev-mirror", .object(arguments))
    }

    /// Changes how fast a job may work (`block-job-set-speed`).
    ///
    /// - Parameters:
    ///   - job: the job's name.
    ///   - speed: bytes per second; 0 for no limit.
    public func setSpeed(ofJob job: String, to speed: UInt64) async throws {
        try await execute("block-job-set-speed", ["device": .string(job), "speed": .integer(Int64(clamping: speed))])
    }

    /// Ends a mirror that is ready: drains it and flushes the target, or drops it at once when forced.
    ///
    /// `job-cancel` would always be forced and abandon what is not copied.
    public func cancelMirror(_ job: String, force: Bool) async throws {
        try await execute("block-job-cancel", ["device": .string(job), "force": .bool(force)])
    }

    /// Closes the connections of NBD nodes, and those of the migration, at once and out of band, even while QEMU waits for one
    /// of them (`yank`).
    public func yank(nodes: [String], migration: Bool) async throws {
        let known = try await execute("query-yank", outOfBand: true).array
        let wanted = known.filter { instance in
            switch instance["type"]?.string {
            case "block-node": instance["node-name"]?.string.map(nodes.contains) ?? false
            case "migration": migration
            default: false
            }
        }
        if !wanted.isEmpty { try await execute("yank", ["instances": .array(wanted)], outOfBand: true) }
    }

    /// Forgets a job that has concluded (`job-dismiss`).
    public func dismiss(_ job: String) async throws { try await execute("job-dismiss", ["id": .string(job)]) }

    /// The drives with a request that failed and that QEMU keeps until `cont` (`query-block`, `io-status`), with the type of
    /// their device: "ide-hd", "virtio-blk-pci".
    public func failedDrives() async throws -> [(name: String, type: String)] {
        var found: [(name: String, type: String)] = []
        for drive in try await execute("query-block").array where drive["io-status"]?.string ?? "ok" != "ok" {
            guard let path = drive["qdev"]?.string, !path.isEmpty else { continue }
            let name = drive["device"]?.string ?? ""
            let type = try await property("type", of: path.hasPrefix("/") ? path : "/machine/peripheral/\(path)")
            found.append((name.isEmpty ? path : name, type?.string ?? ""))
        }
        return found
    }

    /// A job by name; nil when there is none.
    public func job(_ name: String) async throws -> BlockJob? {
        let jobs = try await execute("query-jobs").array
        guard let found = jobs.first(where: { $0["id"]?.string == name }) else { return nil }
        return BlockJob(
            status: found["status"]?.string ?? "",
            current: UInt64(clamping: found["current-progress"]?.integer ?? 0),
            total: UInt64(clamping: found["total-progress"]?.integer ?? 0),
            error: found["error"]?.string
        )
    }
}
