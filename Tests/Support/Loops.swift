internal import Glibc
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

/// Starts a program that listens on 127.0.0.1 and has to be told its port: another one when somebody has taken that meanwhile, as a process
/// that was just started and still has all descriptors of this one.
public func startServer(_ command: (UInt16) -> [String]) async throws -> (process: ChildProcess, port: UInt16) {
    let loop = EventLoop(name: "port")
    defer { loop.stop() }
    for _ in 0..<5 {
        let port = try await freePort()
        let process = try ChildProcess(command(port))
        var isThere = false
        try await process.wait(for: "a listener") {
            isThere = try await loop.run {
                (try? await SocketChannel.connect(to: .inet(host: "127.0.0.1", port: port), on: loop))?.close() != nil
            }
            return isThere || process.errors.contains("in use") || process.output.contains("in use")
        }
        if isThere { return (process, port) }
        process.signal(SIGKILL)
    }
    throw TestFailure("Each free port was taken at once")
}
