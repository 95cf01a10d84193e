internal import IO

extension QMPClient {
    /// Starts QEMU's NBD server on a Unix socket (`nbd-server-start`). There is one in a process.
    public func startNBDServer(socket path: String, connections: Int) async throws {
        try await execute(
            "nbd-server-start",
            [
                "addr": ["type": "unix", "data": ["path": .string(path)]],
                "max-connections": .integer(Int64(connections)),
            ]
        )
    }

    /// Stops QEMU's NBD server, with what it served (`nbd-server-stop`).
    public func stopNBDServer() async throws { try await execute("nbd-server-stop") }

    /// The ids of the block exports, and the nodes they show (`query-block-exports`).
    public func blockExports() async throws -> [(id: String, node: String)] {
        try await execute("query-block-exports").array.compactMap { export in
            export["id"]?.string.map { ($0, export["node-name"]?.string ?? "") }
        }
    }

    /// Shows a node on QEMU's NBD server (`block-export-add`).
    ///
    /// - Parameters:
    ///   - id: the export's id.
    ///   - node: what is shown.
    ///   - name: its name on the NBD server.
    ///   - isWritable: whether it may be written.
    ///   - bitmaps: dirty bitmaps to offer as contexts, with the nodes that have them.
    public func addNBDExport(
        _ id: String,
        node: String,
        name: String,
        isWritable: Bool,
        bitmaps: [(node: String, name: String)] = []
    ) async throws {
        var arguments: [String: JSONValue] = [
            "type": "nbd", "id": .string(id), "node-name": .string(node), "name": .string(name),
            "writable": .bool(isWritable), "allocation-depth": true,
        ]
        if !bitmaps.isEmpty {
            arguments["bitmaps"] = .array(
                bitmaps.map { ["node": .string($0.node), "name": .string($0.name)] as JSONValue }
            )
        }
        try await execute("block-export-add", .object(arguments))
    }

    /// Ends an export, whoever uses it, and waits until it is gone (`block-export-del`).
    public func removeNBDExport(_ id: String) async throws {
        try await execute("block-export-del", ["id": .string(id), "mode": "hard"])
        // It goes when its last request has ended.
        for _ in 0..<500 {
            if try await !blockExports().contains(where: { $0.id == id }) { return }
            await loop.sleep(for: .milliseconds(10))
        }
    }

    /// Pauses the guest's processors (`stop`).
    public func pause() async throws { try await execute("stop") }

    /// Runs several commands as one: all, or none (`transaction`).
    func transaction(_ actions: [(type: String, data: JSONValue)]) async throws {
        guard !actions.isEmpty else { return }
        try await execute(
            "transaction",
            ["actions": .array(actions.map { ["type": .string($0.type), "data": $0.data] as JSONValue })]
        )
    }
}
