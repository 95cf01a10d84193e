extension QMPClient {
    /// The run state: "running", "paused", "inmigrate", "postmigrate" (`query-status`).
    public func status(timeout: Duration = .seconds(10)) async throws -> String {
        try await execute("query-status", timeout: timeout)["status"]?.string ?? "unknown"
    }

    /// The machine type with its version: "pc-i440fx-7.2" (`qom-get /machine type`).
    public func machineType() async throws -> String {
        let type = try await execute("qom-get", ["path": "/machine", "property": "type"]).string ?? ""
        return type.hasSuffix("-machine") ? String(type.dropLast(8)) : type
    }

    /// Resumes the guest (`cont`).
    public func resume() async throws { try await execute("cont") }

    /// Ends QEMU (`quit`). An answer may be lost with the connection.
    public func quit() async { _ = try? await execute("quit", timeout: .seconds(5)) }
}
