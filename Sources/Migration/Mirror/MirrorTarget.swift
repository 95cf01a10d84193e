internal import IO
internal import NBD

/// Where a mirror's export is.
struct MirrorTarget {
    var address: SocketAddress
    var options: NBDClientOptions
    /// How many connections are wanted.
    var connections: Int
    /// Whether lost connections are made again.
    var reconnects: Bool
    /// The number of the export's life; see `ExportTable.addFenced`.
    var epoch: UInt64 = 0
    var isFenced: Bool

    /// Connects to the next life of the export: all connections, or none.
    ///
    /// - Parameters:
    ///   - loop: where they live.
    ///   - dialled: what was begun already, to be used as long as it is still good.
    mutating func connect(on loop: EventLoop, dialled: [DialledConnection] = []) async throws -> [NBDConnection] {
        epoch += 1
        var options = options
        if isFenced { options.export += "#\(epoch)" }
        let (made, failure) = await connectAll(options, on: loop, dialled)
        // A server that does not keep several of them consistent gets one.
        let isShared = made.allSatisfy { $0.flags.contains(.canMultiConn) }
        if failure == nil, isShared || made.count == 1 { return made }
        let reason = ChannelError(.closed, "The mirror could not be connected")
        if failure == nil {
            for connection in made.dropFirst() { connection.abort(reason) }
            return [made[0]]
        }
        for connection in made { connection.abort(reason) }
        throw failure ?? reason
    }

    /// Makes more connections to the life of the export that is connected to: all of them, or none.
    func connectMore(_ count: Int, on loop: EventLoop) async throws -> [NBDConnection] {
        var (more, options) = (self, options)
        more.connections = count
        if isFenced { options.export += "#\(epoch)" }
        let (made, failure) = await more.connectAll(options, on: loop, [])
        guard let failure else { return made }
        for connection in made { connection.abort(ChannelError(.closed, "Another connection could not be made")) }
        throw failure
    }

    /// Makes all connections at once: each takes some five round trips.
    private func connectAll(
        _ options: NBDClientOptions,
        on loop: EventLoop,
        _ dialled: [DialledConnection]
    ) async -> ([NBDConnection], (any Error)?) {
        await withTaskGroup(of: Result<NBDConnection, any Error>.self) { [address, connections] group in
            for index in 0..<max(connections, 1) {
                let begun = index < dialled.count ? dialled[index] : nil
                group.addTask(executorPreference: loop) {
                    if let connection = await begun?.open(options) { return .success(connection) }
                    do { return .success(try await NBDConnection.connect(to: address, on: loop, options)) } catch {
                        return .failure(error)
                    }
                }
            }
            var made: [NBDConnection] = []
            var failure: (any Error)?
            for await result in group {
                switch result {
                case .success(let connection): made.append(connection)
                case .failure(let error): failure = failure ?? error
                }
            }
            return (made, failure)
        }
    }
}
