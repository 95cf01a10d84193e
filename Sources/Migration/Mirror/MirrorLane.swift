internal import IO
internal import NBD
internal import TLS

/// One connection of a mirror to the destination, and its successors.
///
/// Confined to the connection's loop.
final class MirrorLane: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// Where the export is.
    struct Target {
        var address: SocketAddress
        var options: NBDClientOptions
        /// Whether a lost connection is made again.
        var reconnects: Bool
    }

    /// Gets the error, and whether the connection was lost, so that nobody knows what became of the request.
    typealias Completion = (NBDError?, Bool) -> Void

    var target: Target
    /// The connection; nil while there is none.
    private(set) var connection: NBDConnection?
    /// What is under way on it.
    private(set) var changes: [UInt64: DiskChange] = [:]
    /// Whether the connection fails at this moment, and hands back what was under way.
    private(set) var isFailing = false
    private let first: NBDExportInfo
    private let identity: TLSPeer?
    private let loop: EventLoop
    private var isClosed = false
    /// Told when the connection is lost, with the reason.
    var onLost: ((String) -> Void)?
    /// Told of a new connection, before it is used.
    var onConnected: ((NBDConnection) throws -> Void)?
    /// Told when there is no sense in trying again.
    var onBroken: ((String) -> Void)?

    init(_ connection: NBDConnection, _ target: Target) {
        self.connection = connection
        self.target = target
        loop = connection.loop
        first = connection.info
        identity = connection.tls?.peer
        watch(connection)
    }

    var bytesInFlight: Int { connection?.bytesInFlight ?? 0 }

    private func watch(_ connection: NBDConnection) {
        connection.onFailure = { [weak self] error in self?.lost(error) }
    }

    private func lost(_ error: any Error) {
        connection = nil
        isFailing = false
        guard !isClosed else { return }
        // A server that breaks the protocol would break it again.
        if let error = error as? ChannelError, error.code == .protocolViolation { onBroken?(error.message) }
        guard target.reconnects else {
            onBroken?("A connection of the mirror was lost: \(error)")
            return
        }
        onLost?("\(error)")
        Task(executorPreference: loop) { await self.reconnect() }
    }

    private func reconnect() async {
        var pause = Duration.milliseconds(100)
        while !isClosed {
            do {
                var options = target.options
                options.timeout = min(options.timeout, .seconds(3))
                let next = try await NBDConnection.connect(to: target.address, on: loop, options)
                guard !isClosed else { return next.abort(ChannelError(.closed, "The mirror has ended")) }
                var info = next.info
                info.summary = first.summary
                guard info == first, next.tls?.peer == identity else {
                    next.abort(ChannelError(.closed, "The export is not what it was"))
                    onBroken?("The NBD server at \(target.address) came back, but its export is not the same as before")
                    return
                }
                connection = next
                watch(next)
                try onConnected?(next)
                return
            } catch {
                await loop.sleep(for: pause)
                pause = min(pause * 2, .seconds(1))
            }
        }
    }

    func send(_ change: DiskChange, _ completion: @escaping Completion) {
        guard let connection else { return completion(NBDError(.io, "The connection was lost"), true) }
        changes[change.id] = change
        let done: NBDConnection.Completion = { error in
            self.changes[change.id] = nil
            self.finish(connection, error, completion)
        }
        let length = UInt64(change.range.count)
        let offset = change.range.lowerBound
        let asZeroes = change.kind == .zero || change.wasZero && connection.flags.contains(.sendWriteZeroes)
        if asZeroes {
            connection.submit(
                .writeZeroes,
                flags: change.mayDeallocate ? [] : [.noHole],
                offset: offset,
                length: length,
                completion: done
            )
        } else if change.kind == .trim {
            connection.submit(.trim, offset: offset, length: length, completion: done)
        } else {
            connection.submit(.write, offset: offset, length: length, data: change.payload, completion: done)
        }
    }

    func flush(_ completion: @escaping Completion) {
        guard let connection else { return completion(NBDError(.io, "The connection was lost"), true) }
        connection.submit(.flush) { self.finish(connection, $0, completion) }
    }

    private func finish(_ connection: NBDConnection, _ error: NBDError?, _ completion: Completion) {
        // A server that closes its exports may open them again.
        if error?.number == .shutdown { connection.abort(ChannelError(.closed, "The export is being closed")) }
        // Requests are handed back before the failure is told.
        let isLost = error != nil && connection.failure != nil
        if isLost, self.connection === connection { isFailing = true }
        completion(error, isLost)
    }

    /// The connection may end: nothing more will be asked of it.
    func rest() { isClosed = true }

    func close(_ reason: ChannelError) {
        isClosed = true
        connection?.abort(reason)
        connection = nil
    }

    func disconnect() async {
        isClosed = true
        connection?.onFailure = nil
        await connection?.disconnect()
    }
}
