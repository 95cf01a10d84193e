public import IO
internal import Synchronization
internal import TLS

/// The NBD client as a back end: an export of another server, over one or several connections. What a proxy serves, and either
/// end of a copy.
///
/// The connections are spread over loops; whoever calls from one of them uses a connection there, so that nothing crosses
/// threads. A lost connection is made again for a while, and the requests that were under way are sent again: each of
/// them says what a range shall be, or asks, so that doing it twice does no harm. The server must be the same as before: its
/// identity, the size, the flags, the block sizes.
///
/// A new connection cannot tell whether the server still has what it acknowledged and never made durable. Therefore the
/// first `flush` after a connection was lost fails when there were such writes; whoever still has the data writes it again and
/// then flushes again.
public final class ClientBackEnd: BackEnd {
    /// How hard to try to keep a connection.
    public struct Persistence: Sendable {
        /// How long a lost connection is tried again; not at all when it is nil.
        public var reconnect: Duration?
        /// The time between two attempts.
        public var pause = Duration.milliseconds(200)

        /// Gives up at once.
        public init() {}
        /// Tries for so long.
        public init(reconnect: Duration) { self.reconnect = reconnect }
    }

    /// What the server said about the export.
    public let info: NBDExportInfo
    /// How many bytes there are.
    public var size: UInt64 { info.size }
    /// Whether the server refuses writes.
    public var isReadOnly: Bool { info.flags.contains(.readOnly) }
    /// See `BackEnd.traits`.
    public let traits: BackEndTraits
    /// The form of headers that was agreed on.
    public let form: HeaderForm
    /// The version and the cipher of TLS; nil in clear text.
    public let tls: (version: String, cipher: String)?
    /// About how long the network takes to the server and back.
    public let roundTrip: Duration
    /// How many connections there are.
    public var connectionCount: Int { lanes.count }
    private let lanes: [Lane]
    /// The lanes of each loop.
    private let byLoop: [(loop: EventLoop, lanes: [Lane])]
    private let durability: Durability

    /// Counts lost connections: each may have taken acknowledged changes with it.
    private final class Durability: Sendable {
        let losses = Atomic<UInt64>(0)
        /// The losses that a flush has reported.
        let reported = Atomic<UInt64>(0)

        func watch(_ connection: NBDConnection) {
            connection.onFailure = { [self] _ in losses.wrappingAdd(1, ordering: .sequentiallyConsistent) }
        }
    }

    /// One connection, and its successors.
    private final class Lane: @unchecked Sendable {
        // Unchecked: confined to the loop.
        let loop: EventLoop
        private let address: SocketAddress
        private let options: NBDClientOptions
        private let persistence: Persistence
        private let durability: Durability
        private(set) var connection: NBDConnection
        private let identity: TLSPeer?
        private let reconnecting = AsyncLock()
        private var failure: NBDError?

        init(
            _ connection: NBDConnection,
            _ address: SocketAddress,
            _ options: NBDClientOptions,
            _ persistence: Persistence,
            _ durability: Durability
        ) {
            self.connection = connection
            loop = connection.loop
            self.address = address
            self.options = options
            self.persistence = persistence
            self.durability = durability
            identity = connection.tls?.peer
            durability.watch(connection)
        }

        var bytesInFlight: Int { connection.bytesInFlight }

        /// Runs a request, again after a lost connection, a few times.
        func perform<T>(_ body: (NBDConnection) async throws -> T) async throws -> T {
            var attempts = 0
            while true {
                if let failure { throw failure }
                let current = connection
                do {
                    return try await body(current)
                } catch let error as NBDError {
                    // An error of the server is its answer; one of the connection may be mended.
                    guard let reason = current.failure else { throw options.explain?(error) ?? error }
                    // A server that breaks the protocol would break it again.
                    if let reason = reason as? ChannelError, reason.code == .protocolViolation || reason.code == .tls {
                        throw fail(reason.message)
                    }
                    attempts += 1
                    guard attempts <= 5 else {
                        throw fail("The NBD connection was lost \(attempts) times over one request: \(reason)")
                    }
                    if attempts > 1 { await loop.sleep(for: persistence.pause) }
                    try await reconnect(after: current)
                }
            }
        }

        private func reconnect(after lost: NBDConnection) async throws {
            await reconnecting.acquire()
            defer { reconnecting.release() }
            if connection !== lost { return }
            if let failure { throw failure }
            let reason = lost.failure.map { "\($0)" } ?? "unknown"
            guard let limit = persistence.reconnect else { throw fail("The NBD connection was lost: \(reason)") }
            let end = ContinuousClock.now + limit
            var last = reason
            while ContinuousClock.now < end {
                do {
                    var options = options
                    options.timeout = min(options.timeout, end - .now)
                    let next = try await NBDConnection.connect(to: address, on: loop, options)
                    guard next.info == lost.info, next.form == lost.form, next.contexts == lost.contexts,
                        next.tls?.peer == identity
                    else {
                        next.abort(ChannelError(.closed, "The export is not what it was"))
                        throw fail("The NBD server at \(address) came back, but its export is not the same as before")
                    }
                    connection = next
                    durability.watch(next)
                    return
                } catch let error as ChannelError {
                    last = error.message
                }
                await loop.sleep(for: persistence.pause)
            }
            throw fail("The NBD connection was lost and could not be made again within \(limit): \(last)")
        }

        private func fail(_ text: String) -> NBDError {
            let error = NBDError(.io, text)
            failure = error
            return error
        }

        func disconnect() async {
            failure = NBDError(.io, "The NBD connection is closed")
            await connection.disconnect()
        }
    }

    /// Connects.
    ///
    /// - Parameters:
    ///   - address: the server.
    ///   - options: the export, the credentials and the contexts; `base:allocation` is asked for in any case.
    ///   - connections: how many connections; one when the server cannot keep several consistent. When it is nil, one for each
    ///     loop, and more when the way is long, where one connection alone could not fill it.
    ///   - loops: where they live.
    ///   - persistence: what to do about lost connections.
    /// - Throws: `ChannelError` or `CredentialError`.
    public static func open(
        _ address: SocketAddress,
        _ options: NBDClientOptions,
        connections: Int? = 1,
        loops: EventLoopGroup,
        persistence: Persistence = Persistence()
    ) async throws -> ClientBackEnd {
        var options = options
        if !options.contexts.contains(MetaContext.allocation) {
            options.contexts.insert(MetaContext.allocation, at: 0)
        }
        let durability = Durability()
        var lanes: [Lane] = []
        var wanted = 1
        do {
            while lanes.count < wanted {
                let loop = loops.next()
                let lane = try await loop.run { [options] in
                    Lane(
                        try await NBDConnection.connect(to: address, on: loop, options),
                        address,
                        options,
                        persistence,
                        durability
                    )
                }
                lanes.append(lane)
                if lanes.count == 1, lane.connection.flags.contains(.canMultiConn) {
                    wanted = max(connections ?? Self.connections(lane.connection.roundTrip, loops), 1)
                }
                guard lane.connection.info == lanes[0].connection.info else {
                    throw ChannelError(.protocolViolation, "The NBD server at \(address) changed the export meanwhile")
                }
            }
        } catch {
            for lane in lanes { try? await lane.loop.run { await lane.disconnect() } }
            throw error
        }
        return ClientBackEnd(lanes, durability)
    }

    private static func connections(_ roundTrip: Duration, _ loops: EventLoopGroup) -> Int {
        roundTrip > .milliseconds(5) ? max(8, loops.loops.count) : max(2, loops.loops.count)
    }

    /// How many requests of a size keep each connection busy: two on a short way, where more would only push what is about
    /// to be encrypted out of the caches, and as many as a link of 10 Gbit/s has under way on a long one.
    public func window(requestSize: Int) -> Int {
        let underWay = max(roundTrip / .seconds(1), 0) * 1.25e9
        let each = underWay / Double(requestSize * lanes.count)
        return min(2 + Int(each.rounded(.up)), max(2, (64 << 20) / (requestSize * lanes.count)))
    }

    private init(_ lanes: [Lane], _ durability: Durability) {
        self.lanes = lanes
        self.durability = durability
        let first = lanes[0].connection
        info = first.info
        form = first.form
        roundTrip = first.roundTrip
        tls = first.tls.map { ($0.version, $0.cipher) }
        var byLoop: [(loop: EventLoop, lanes: [Lane])] = []
        for lane in lanes {
            if let index = byLoop.firstIndex(where: { $0.loop === lane.loop }) {
                byLoop[index].lanes.append(lane)
            } else {
                byLoop.append((lane.loop, [lane]))
            }
        }
        self.byLoop = byLoop
        var traits = BackEndTraits()
        traits.blockSizes = info.effectiveBlockSizes
        traits.blockSizesAreAssumed = info.blockSizes == nil
        traits.isRotational = info.flags.contains(.rotational)
        traits.hasFastZero = info.flags.contains(.sendFastZero)
        traits.hasTrim = info.flags.contains(.sendTrim)
        traits.hasCache = info.flags.contains(.sendCache)
        traits.isConsistent = lanes.count == 1 || info.flags.contains(.canMultiConn)
        traits.contexts = first.contexts
        self.traits = traits
    }

    /// The loops that the connections live on, one entry for each connection.
    public var loops: [EventLoop] { lanes.map(\.loop) }

    /// Runs a request on a connection of the caller's loop, or on the first one.
    private func perform<T: Sendable>(_ body: @escaping @Sendable (NBDConnection) async throws -> T) async throws -> T {
        for (loop, lanes) in byLoop where loop.isCurrent {
            var best = lanes[0]
            for lane in lanes.dropFirst() where lane.bytesInFlight < best.bytesInFlight { best = lane }
            return try await best.perform(body)
        }
        let lane = lanes[0]
        return try await lane.loop.run { try await lane.perform(body) }
    }

    private func change(fua: Bool, _ body: @escaping @Sendable (NBDConnection) async throws -> Void) async throws {
        try await perform(body)
        if fua, !info.flags.contains(.sendFUA) { try await flush() }
    }

    /// Always waits for the server.
    public func tryRead(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws -> Bool { false }

    /// See `BackEnd.read(into:at:)`.
    public func read(into payload: Payload, at offset: UInt64) async throws {
        try await perform { connection in
            try await Self.inParts(payload, connection) { try await connection.read(into: $0, at: offset + $1) }
        }
    }

    /// Always waits for the server.
    public func tryWrite(_ payload: Payload, at offset: UInt64, fua: Bool) throws -> Bool { false }

    /// See `BackEnd.write(_:at:fua:)`.
    public func write(_ payload: Payload, at offset: UInt64, fua: Bool) async throws {
        let direct = fua && info.flags.contains(.sendFUA)
        try await change(fua: fua) { connection in
            try await Self.inParts(payload, connection) {
                try await connection.write($0, at: offset + $1, fua: direct)
            }
        }
    }

    private static func inParts(
        _ payload: Payload,
        _ connection: NBDConnection,
        _ body: (Payload, UInt64) async throws -> Void
    ) async throws {
        let sizes = connection.info.effectiveBlockSizes
        let largest = Int(min(sizes.maximum, UInt32(NBDWire.maximumPayload)) & ~(sizes.minimum - 1))
        var done = 0
        repeat {
            let part = min(payload.count - done, largest)
            try await body(payload.part(done..<(done + part)), UInt64(done))
            done += part
        } while done < payload.count
    }

    /// See `BackEnd.zero(at:count:_:)`. A server without WRITE_ZEROES gets zeroes as data.
    public func zero(at offset: UInt64, count: UInt64, _ options: ZeroOptions) async throws {
        let fua = options.contains(.fua)
        guard info.flags.contains(.sendWriteZeroes) else {
            if options.contains(.fast) { throw NBDError(.notSupported, "The NBD server offers no fast zeroes") }
            let zeroes = IOBuffer(copying: [UInt8](repeating: 0, count: 256 << 10))
            var done: UInt64 = 0
            while done < count {
                let part = min(count - done, UInt64(zeroes.capacity))
                try await write(Payload(zeroes, 0..<Int(part)), at: offset + done, fua: false)
                done += part
            }
            if fua { try await flush() }
            return
        }
        try await change(fua: false) {
            try await $0.zero(
                at: offset,
                count: count,
                mayDeallocate: options.contains(.mayDeallocate),
                fast: options.contains(.fast)
            )
        }
        if fua { try await flush() }
    }

    /// See `BackEnd.trim(at:count:fua:)`.
    public func trim(at offset: UInt64, count: UInt64, fua: Bool) async throws {
        guard info.flags.contains(.sendTrim) else { return }
        try await change(fua: false) { try await $0.trim(at: offset, count: count) }
        if fua { try await flush() }
    }

    /// See `BackEnd.cache(at:count:)`.
    public func cache(at offset: UInt64, count: UInt64) async throws {
        guard info.flags.contains(.sendCache) else { return }
        try await perform { try await $0.cache(at: offset, count: count) }
    }

    /// Makes all completed writes durable, on every connection.
    ///
    /// - Throws: `NBDError`; once also after a connection was lost: what was acknowledged and not flushed may be gone, and must be
    ///   written again before the next flush.
    public func flush() async throws {
        guard try await flushUnlessLost() else {
            throw NBDError(
                .io,
                "The NBD connection was lost and made again; the server may have lost what had not been flushed"
            )
        }
    }

    /// The same, for who has the data still. At most one call at a time.
    ///
    /// - Returns: false when a connection was lost since the last call: what was written since the last call that returned true
    ///   may be gone, and must be written again.
    func flushUnlessLost() async throws -> Bool {
        if info.flags.contains(.sendFlush), !isReadOnly { try await perform { try await $0.flush() } }
        let losses = durability.losses.load(ordering: .sequentiallyConsistent)
        return durability.reported.exchange(losses, ordering: .sequentiallyConsistent) == losses
    }

    /// See `BackEnd.extents(at:count:limit:)`. A server that cannot tell has data everywhere.
    public func extents(at offset: UInt64, count: UInt64, limit: Int) async throws -> [Extent] {
        guard traits.contexts.contains(MetaContext.allocation) else {
            return [Extent(length: count, isHole: false, isZero: false)]
        }
        return try await extents(of: MetaContext.allocation, at: offset, count: count, limit: limit)
    }

    /// How often a server with 32-bit lengths is asked for one answer.
    private static let inquiries = 64

    /// See `BackEnd.extents(of:at:count:limit:)`. What a server with 32-bit lengths has to tell in several answers is put together, up to
    /// some 250 GiB.
    public func extents(of context: String, at offset: UInt64, count: UInt64, limit: Int) async throws -> [Extent] {
        var found: [Extent] = []
        var told: UInt64 = 0
        for _ in 0..<Self.inquiries {
            let (position, rest) = (offset + told, count - told)
            let answer = try await perform {
                try await $0.extents(of: context, at: position, count: rest, one: limit == 1)
            }
            for extent in answer {
                if let last = found.last, last.flags == extent.flags {
                    found[found.count - 1].length += extent.length
                } else if found.count < limit {
                    found.append(extent)
                } else {
                    return found
                }
            }
            let length = answer.reduce(0) { $0 + $1.length }
            told += length
            // Only an answer that reaches as far as it was possible to ask says nothing about what is behind it.
            guard form != .extended, length >= NBDConnection.longestShortStatus, told < count else { break }
        }
        return found
    }

    /// Says goodbye on all connections, after what is under way.
    public func close() async {
        for lane in lanes { try? await lane.loop.run { await lane.disconnect() } }
    }
}
