internal import CLinux
internal import IO
internal import NBD
internal import Synchronization

/// What a mirror has moved, readable from any thread.
public final class MirrorCounters: Sendable {
    private let sent = Atomic<UInt64>(0)
    private let zeroed = Atomic<UInt64>(0)
    private let backlog = Atomic<UInt64>(0)

    /// Payload bytes that the destination has acknowledged.
    public var bytesSent: UInt64 { sent.load(ordering: .relaxed) }
    /// Bytes that were sent as "zeroes here" instead of as data.
    public var zeroBytes: UInt64 { zeroed.load(ordering: .relaxed) }
    /// Bytes that QEMU believes to be written and the destination has not acknowledged.
    public var bytesInFlight: UInt64 { backlog.load(ordering: .relaxed) }

    func sent(_ count: Int) { sent.wrappingAdd(UInt64(count), ordering: .relaxed) }
    func zeroed(_ count: UInt64) { zeroed.wrappingAdd(count, ordering: .relaxed) }
    func inFlight(_ count: Int) { backlog.store(UInt64(count), ordering: .relaxed) }
}

/// A disk at the destination, reached over several connections: the far end of a mirror relay.
///
/// Plain writes are acknowledged before the destination has them, which hides the round trip. That is sound because a
/// FLUSH is a barrier over all connections, overlapping requests keep their order, and after any loss every later
/// request fails (fail-stop): QEMU's mirror ends with an error instead of a wrong image. Confined to one loop.
final class RemoteDisk: BackEnd, @unchecked Sendable {
    // Unchecked: confined to the connections' loop, but for the counters.

    /// How many bytes may be written and not acknowledged: the memory that a relay holds at most.
    private static let window = 32 << 20

    let size: UInt64
    let isReadOnly = false
    let counters: MirrorCounters
    private let connections: [NBDConnection]
    private var pending: [UInt64: Range<UInt64>] = [:]
    private var nextID: UInt64 = 0
    private var bytesPending = 0
    private let changed = AsyncCondition()
    private(set) var failure: NBDError?

    init(connections: [NBDConnection], counters: MirrorCounters) {
        self.connections = connections
        self.counters = counters
        size = connections[0].size
        for connection in connections {
            connection.onFailure = { [weak self] error in
                self?.fail(NBDError(.io, "A connection of the mirror was lost: \(error)"))
            }
        }
    }

    private func fail(_ error: NBDError) {
        if failure == nil { failure = error }
        changed.signal()
    }

    /// Fails every request from now on, and those under way.
    func abort(_ reason: ChannelError) {
        fail(NBDError(.io, reason.message))
        for connection in connections { connection.abort(reason) }
    }

    /// Says goodbye on all connections.
    func disconnect() async {
        for connection in connections {
            connection.onFailure = nil
            await connection.disconnect()
        }
    }

    private func check() throws { if let failure { throw failure } }

    private func overlaps(_ range: Range<UInt64>) -> Bool {
        for other in pending.values where other.overlaps(range) { return true }
        return false
    }

    private func waitForOverlapping(_ range: Range<UInt64>) async throws {
        try check()
        while overlaps(range) {
            await changed.wait()
            try check()
        }
    }

    /// The connection with the least under way.
    private var idlest: NBDConnection {
        var best = connections[0]
        for connection in connections.dropFirst() where connection.bytesInFlight < best.bytesInFlight {
            best = connection
        }
        return best
    }

    /// Registers a change; the returned closure ends it.
    private func begin(_ range: Range<UInt64>, bytes: Int) -> (NBDError?) -> Void {
        let id = nextID
        nextID += 1
        pending[id] = range
        bytesPending += bytes
        counters.inFlight(bytesPending)
        return { error in
            self.pending[id] = nil
            self.bytesPending -= bytes
            self.counters.inFlight(self.bytesPending)
            if let error { self.fail(error) }
            self.changed.signal()
        }
    }

    private func send(_ payload: Payload, at offset: UInt64) {
        let range = offset..<(offset + UInt64(payload.count))
        let bytes = payload.bytes
        if xd_is_zero(bytes.baseAddress, bytes.count) != 0, idlest.flags.contains(.sendWriteZeroes) {
            let end = begin(range, bytes: payload.count)
            idlest.submit(.writeZeroes, offset: offset, length: UInt64(payload.count)) { error in
                if error == nil { self.counters.zeroed(UInt64(payload.count)) }
                end(error)
            }
        } else {
            let end = begin(range, bytes: payload.count)
            idlest.submit(.write, offset: offset, length: UInt64(payload.count), data: payload) { error in
                if error == nil { self.counters.sent(payload.count) }
                end(error)
            }
        }
    }

    func tryRead(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws -> Bool { false }

    func read(into payload: Payload, at offset: UInt64) async throws {
        try await waitForOverlapping(offset..<(offset + UInt64(payload.count)))
        try await idlest.read(into: payload, at: offset)
    }

    func tryWrite(_ payload: Payload, at offset: UInt64, fua: Bool) throws -> Bool {
        try check()
        if payload.count == 0 { return true }
        guard !fua, bytesPending + payload.count <= Self.window,
            !overlaps(offset..<(offset + UInt64(payload.count)))
        else { return false }
        send(payload, at: offset)
        return true
    }

    func write(_ payload: Payload, at offset: UInt64, fua: Bool) async throws {
        try check()
        let range = offset..<(offset + UInt64(payload.count))
        while (bytesPending > 0 && bytesPending + payload.count > Self.window) || overlaps(range) {
            await changed.wait()
            try check()
        }
        send(payload, at: offset)
        if fua { try await flush() }
    }

    func zero(at offset: UInt64, count: UInt64, _ options: ZeroOptions) async throws {
        if count == 0 { return }
        let range = offset..<(offset + count)
        try await waitForOverlapping(range)
        let end = begin(range, bytes: 0)
        do {
            try await idlest.zero(at: offset, count: count, mayDeallocate: options.contains(.mayDeallocate))
            counters.zeroed(count)
            end(nil)
        } catch let error as NBDError {
            end(error)
            throw error
        }
        if options.contains(.fua) { try await flush() }
    }

    func trim(at offset: UInt64, count: UInt64, fua: Bool) async throws {
        if count == 0 { return }
        let range = offset..<(offset + count)
        try await waitForOverlapping(range)
        let end = begin(range, bytes: 0)
        do {
            try await idlest.trim(at: offset, count: count)
            end(nil)
        } catch let error as NBDError {
            end(error)
            throw error
        }
        if fua { try await flush() }
    }

    func flush() async throws {
        try check()
        // Everything acknowledged to QEMU before this flush must be at the destination before it is made durable.
        let before = nextID
        while pending.keys.contains(where: { $0 < before }) {
            await changed.wait()
            try check()
        }
        do {
            try await idlest.flush()
        } catch let error as NBDError {
            fail(error)
            throw error
        }
        try check()
    }

    func extents(at offset: UInt64, count: UInt64, limit: Int) async throws -> [Extent] {
        [Extent(length: count, isHole: false, isZero: false)]
    }
}
