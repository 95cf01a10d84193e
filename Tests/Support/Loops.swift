public import IO

/// Runs a test body on a loop of its own.
public func onLoop(_ body: @escaping @Sendable (EventLoop) async throws -> Void) async throws {
    let loop = EventLoop(name: "test")
    defer { loop.stop() }
    try await loop.run { try await body(loop) }
}

/// The port that the system has just given to somebody who no longer wants it.
public func freePort() async throws -> UInt16 {
    let loop = EventLoop(name: "port")
    defer { loop.stop() }
    return try await loop.run {
        let listener = try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
        defer { listener.close() }
        return listener.address.port ?? 0
    }
}
