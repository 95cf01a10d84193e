internal import IO
internal import NBD
internal import TLS

/// One connection of a mirror to the destination.
///
/// Confined to the connection's loop.
final class MirrorLane: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// Gets the error, and whether the connection was lost, so that nobody knows what became of the request.
    typealias Completion = (NBDError?, Bool) -> Void

    let connection: NBDConnection
    /// What is under way on it.
    private(set) var changes: [UInt64: DiskChange] = [:]

    init(_ connection: NBDConnection) { self.connection = connection }

    var bytesInFlight: Int { connection.bytesInFlight }

    /// Sends a change; what was compressed of it, if there is something.
    func send(_ change: DiskChange, packed: Payload? = nil, _ completion: @escaping Completion) {
        changes[change.id] = change
        let done: NBDConnection.Completion = { error in
            self.changes[change.id] = nil
            self.finish(error, completion)
        }
        let length = UInt64(change.range.count)
        let offset = change.range.lowerBound
        if let packed { return connection.submitCompressed(packed, offset: offset, length: length, completion: done) }
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
        connection.submit(.flush) { self.finish($0, completion) }
    }

    private func finish(_ error: NBDError?, _ completion: Completion) {
        // A server that closes its exports may open them again.
        if error?.number == .shutdown { connection.abort(ChannelError(.closed, "The export is being closed")) }
        completion(error, error != nil && connection.failure != nil)
    }
}
