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
    mutating func connect(on loop: EventLoop) async throws -> [NBDConnection] {
        epoch += 1
        var options = options
        if isFenced { options.export += "#\(epoch)" }
        var made: [NBDConnection] = []
        do {
            made.append(try await NBDConnection.connect(to: address, on: loop, options))
            while made.count < connections, made[0].flags.contains(.canMultiConn) {
                made.append(try await NBDConnection.connect(to: address, on: loop, options))
            }
            return made
        } catch {
            for connection in made { connection.abort(ChannelError(.closed, "The mirror could not be connected")) }
            throw error
        }
    }
}
