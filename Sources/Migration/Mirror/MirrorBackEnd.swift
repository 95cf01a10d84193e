internal import CLinux
internal import IO
internal import NBD
internal import TLS

/// The back end of a mirror relay: a disk at the destination, and all that may have to be sent there again.
///
/// Plain writes are acknowledged before the destination has them, which hides the round trip. That is sound because a
/// FLUSH is a barrier over all connections, until another one is promised that comes when QEMU has gone (`promiseBarrier`),
/// overlapping requests keep their order, and what was acknowledged is kept until
/// it is durable at the destination: requests under way go out again over a new connection, and when the export has begun
/// anew, since its agent or its host has, all since the last FLUSH that was answered. What cannot be mended fails every
/// later request (fail-stop): QEMU's mirror ends with an error instead of a wrong image. Confined to one loop.
final class MirrorBackEnd: BackEnd, @unchecked Sendable {
    // Unchecked: confined to the connections' loop, but for the counters.

    let size: UInt64
    let isReadOnly = false
    let traits: BackEndTraits
    let counters: MirrorCounters
    private let endurance: MirrorEndurance
    private let loop: EventLoop
    private var target: MirrorTarget
    private let first: NBDExportInfo
    private let identity: TLSPeer?
    /// The connections; none while there is an outage. They are lost and made together, so that nothing of the lost ones can
    /// come between what is sent again.
    private var lanes: [MirrorLane] = []
    /// Which life of the destination's agent the connections belong to.
    private var generation: String
    /// Everything that the destination has not acknowledged.
    private var pending: [UInt64: DiskChange] = [:]
    /// Those of them that wait for a connection, in their order.
    private var queue: [DiskChange] = []
    /// What it has acknowledged and not made durable.
    private var retained = RetainedChanges()
    /// What the way there carries.
    private var path = PathEstimate()
    /// Whether more connections would carry more.
    private var growth: LaneGrowth
    private var isGrowing = false
    /// Makes writes shorter.
    private var packer: WritePacker
    private var nextID: UInt64 = 0
    private var bytesPending = 0
    private var isResting = false
    private var hasBarrier = false
    private var isReconnecting = false
    private let changed = AsyncCondition()
    private(set) var failure: NBDError?
    private var outageTimer: LoopTimer?
    private var isFull = false
    /// What the source has, chunk by chunk.
    let sums: ChunkSums
    /// Takes out what the destination has already; nil when it began with an empty image.
    let seed: SeedFilter?
    /// Bounds what is sent where QEMU's own limit would also count what is not.
    private let limit: RateLimit?
    /// Told on the loop when an outage begins, with the reason, and with nil when it is over.
    var onOutage: ((String?) -> Void)?
    /// Told once on the loop when nothing can be mended.
    var onFailure: ((String) -> Void)?

    /// Takes over connections.
    init(
        connections: [NBDConnection],
        to target: MirrorTarget,
        endurance: MirrorEndurance,
        counters: MirrorCounters,
        sums: ChunkSums,
        seed: SeedFilter? = nil,
        connectionsAtMost: Int = 0
    ) {
        growth = LaneGrowth(atMost: connections[0].flags.contains(.canMultiConn) ? connectionsAtMost : 0)
        self.counters = counters
        self.seed = seed
        limit = seed != nil && endurance.bandwidth > 0 ? RateLimit(bytesPerSecond: endurance.bandwidth) : nil
        self.endurance = endurance
        let mayCompress = connections[0].form == .extended
        packer = WritePacker(mayCompress ? endurance.compression : .off, line: endurance.lineRate)
        self.sums = sums
        self.target = target
        self.target.options.timeout = min(target.options.timeout, .seconds(3))
        loop = connections[0].loop
        first = connections[0].info
        size = first.size
        identity = connections[0].tls?.peer
        generation = first.summary ?? ""
        var traits = BackEndTraits()
        // Whole chunks are what the proof at the end is made of.
        traits.blockSizes = BlockSizes(minimum: 1, preferred: UInt32(ChunkDigests.chunkSize))
        self.traits = traits
        use(connections)
    }

    private func use(_ connections: [NBDConnection]) {
        lanes = connections.map(MirrorLane.init)
        watch(connections)
    }

    private func watch(_ connections: [NBDConnection]) {
        counters.opened(lanes.count)
        for connection in connections {
            connection.onFailure = { [weak self] error in self?.lost(error) }
            // One that has failed already tells nobody.
            if let failure = connection.failure { loop.execute { self.lost(failure) } }
        }
    }

    // MARK: Failure and outage

    private func fail(_ error: NBDError) {
        guard failure == nil else { return }
        failure = error
        outageTimer?.cancel()
        let last = lanes
        lanes = []
        seed?.end()
        for lane in last { lane.connection.abort(ChannelError(.closed, error.message)) }
        pending = [:]
        queue = []
        retained.removeAll()
        bytesPending = 0
        counters.inFlight(0)
        changed.signal()
        onFailure?(error.message)
        onFailure = nil
        onOutage = nil
    }

    /// Fails every request from now on, and those under way.
    func abort(_ reason: ChannelError) { fail(NBDError(.io, reason.message)) }

    /// From here on a FLUSH is answered at once. QEMU flushes when it stops the guest and when it ends the mirror, and nobody relies on
    /// what is durable then but who asks the destination to prepare, which makes all durable that `rest` has waited for: a
    /// guest that is paused does not wait twice more for the line.
    func promiseBarrier() { hasBarrier = true }

    /// QEMU has gone: once the destination has everything it may close the export.
    ///
    /// - Throws: `NBDError` when something has failed.
    func rest() async throws {
        while !pending.isEmpty {
            try check()
            await changed.wait()
        }
        try check()
        isResting = true
    }

    /// Says goodbye on all connections.
    func disconnect() async {
        isResting = true
        outageTimer?.cancel()
        for lane in lanes {
            lane.connection.onFailure = nil
            await lane.connection.disconnect()
        }
    }

    /// Bounds what is sent of a disk that was begun with an image, in bytes a second, if it is bounded.
    func limit(to speed: UInt64) { limit?.change(to: speed) }

    /// Where the server listens from now on.
    func move(to address: SocketAddress) { target.address = address }

    private func check() throws { if let failure { throw failure } }

    private func beginOutage(_ reason: String) {
        guard outageTimer == nil, failure == nil else { return }
        outageTimer = loop.schedule(after: endurance.patience) {
            self.fail(NBDError(.io, "\(reason); it was waited for \(self.endurance.patience)"))
        }
        onOutage?(reason)
    }

    private func endOutage() {
        guard let outageTimer, !isFull, !lanes.isEmpty else { return }
        outageTimer.cancel()
        self.outageTimer = nil
        onOutage?(nil)
    }

    /// One connection was lost, and the others are given up with it.
    private func lost(_ error: any Error) {
        guard !isResting, failure == nil, !lanes.isEmpty else { return }
        let last = lanes
        lanes = []
        for lane in last { lane.connection.abort(ChannelError(.closed, "Another connection of the mirror was lost")) }
        // A server that breaks the protocol would break it again.
        if let error = error as? ChannelError, error.code == .protocolViolation {
            return fail(NBDError(.io, error.message))
        }
        guard target.reconnects else { return fail(NBDError(.io, "A connection of the mirror was lost: \(error)")) }
        beginOutage("The mirror's connections were lost: \(error)")
        changed.signal()
        if isReconnecting { return }
        isReconnecting = true
        Task(executorPreference: loop) {
            await self.reconnect()
            self.isReconnecting = false
        }
    }

    private func reconnect() async {
        var pause = Duration.milliseconds(100)
        while failure == nil, !isResting {
            do {
                let connections = try await target.connect(on: loop)
                guard failure == nil, !isResting, connections.allSatisfy({ $0.failure == nil }) else {
                    for one in connections {
                        one.abort(ChannelError(.closed, "The mirror has ended, or was lost again"))
                    }
                    continue
                }
                for connection in connections {
                    var info = connection.info
                    (info.name, info.summary) = (first.name, first.summary)
                    guard info == first, connection.tls?.peer == identity else {
                        for one in connections { one.abort(ChannelError(.closed, "The export is not what it was")) }
                        return fail(
                            NBDError(
                                .io,
                                "The NBD server at \(target.address) came back, but its export is not the same as before"
                            )
                        )
                    }
                }
                return connected(connections)
            } catch {
                await loop.sleep(for: pause)
                pause = min(pause * 2, .seconds(1))
            }
        }
    }

    private func connected(_ connections: [NBDConnection]) {
        let now = connections[0].info.summary ?? ""
        if now != generation {
            // Nobody knows what of the acknowledged changes the new server still has.
            generation = now
            let again = retained.takeAll()
            for change in again {
                change.isRepeated = true
                pending[change.id] = change
                bytesPending += change.bytes
                counters.resent(change.bytes)
            }
            counters.inFlight(bytesPending)
            queue = (queue + again).sorted { $0.id < $1.id }
        }
        for _ in connections { counters.reconnected() }
        path.restart()
        growth.forget(counters.bytesSent, now: .now)
        use(connections)
        endOutage()
        pump()
        changed.signal()
    }

    // MARK: Changes

    /// How many requests to zero or trim may wait for the destination.
    private static let mostEmptying = 256

    private func overlaps(_ range: Range<UInt64>) -> Bool {
        for other in pending.values where other.range.overlaps(range) { return true }
        return false
    }

    private func isUnderWay(_ range: Range<UInt64>) -> Bool {
        for lane in lanes { for other in lane.changes.values where other.range.overlaps(range) { return true } }
        return false
    }

    /// How many bytes that the destination has acknowledged may not be durable there, and are sent again in the worst case, on a line that is short.
    private var shortDoubt: Int {
        let copied = max(endurance.expected, counters.bytesSent)
        return min(max(8 << 20, Int(clamping: copied / 100)), endurance.memory / 2)
    }

    /// How many bytes that may be on any line: a hundredth of what is copied in all, but enough for the disk to work on, and four times what
    /// is under way on a line that is just full.
    private var doubtLimit: Int {
        // What is on its way is half of that on a long line, so both together fit.
        min(max(shortDoubt, 4 * path.product), isLong ? endurance.memory / 3 * 2 : endurance.memory / 2)
    }

    private var isLong: Bool { path.roundTrip.map { $0 >= PathEstimate.long } ?? false }

    /// How many bytes may wait for the destination: what the line holds twice, so that it never runs dry.
    private var pendingLimit: Int {
        let limit = min(max(MirrorEndurance.leastPending, 2 * path.product), endurance.memory / 2)
        guard isLong else { return limit }
        // A FLUSH arrives after what was sent before it. Were that more than may be in doubt, all would wait for its answer, again and again.
        return min(limit, doubtLimit / 2)
    }

    /// Whether so many bytes more may be kept.
    private func hasRoom(_ bytes: Int) -> Bool {
        if bytesPending == 0, retained.bytes == 0 { return true }
        return bytesPending + bytes <= pendingLimit && retained.bytes < doubtLimit
            && pending.count + retained.count < 1 << 16
    }

    private func admit(_ range: Range<UInt64>, bytes: Int) async throws {
        try check()
        while !hasRoom(bytes) || overlaps(range) {
            // What is durable need not be kept; what is under way must.
            if !hasRoom(bytes), bytesPending + bytes <= pendingLimit { makeDurable(now: true) }
            await changed.wait()
            try check()
        }
    }

    /// The connection with the least under way.
    private var idlest: MirrorLane? {
        var best: MirrorLane?
        for lane in lanes where best == nil || lane.bytesInFlight < best?.bytesInFlight ?? 0 { best = lane }
        return best
    }

    private func begin(_ change: DiskChange) {
        pending[change.id] = change
        bytesPending += change.bytes
        counters.inFlight(bytesPending)
        if queue.isEmpty, !isFull, let lane = idlest { send(change, on: lane) } else { queue.append(change) }
    }

    private func makeID() -> UInt64 {
        nextID += 1
        return nextID
    }

    /// Sends what waits. Changes that were sent before may overlap, so each waits for those before it.
    private func pump() {
        var sent = 0
        while sent < queue.count, !isFull, failure == nil, let lane = idlest, !isUnderWay(queue[sent].range) {
            send(queue[sent], on: lane)
            sent += 1
        }
        if sent > 0 { queue.removeFirst(min(sent, queue.count)) }
    }

    private func send(_ change: DiskChange, on lane: MirrorLane) {
        let sent = ContinuousClock.now
        let packed = change.isData ? change.payload.flatMap { packer.pack($0) } : nil
        lane.send(change, packed: packed) { error, isLost in
            if let error { return self.failed(change, error, isLost: isLost) }
            let now = ContinuousClock.now
            if change.isData {
                let onLine = packed?.count ?? change.bytes
                self.packer.sent(onLine)
                self.counters.onLine(onLine)
            }
            if self.path.answered(change.bytes, sent: sent, now: now) {
                self.packer.endPeriod(isFull: self.isFullLine, now: now)
                self.grow(now)
            }
            self.acknowledged(change)
        }
    }

    /// Whether more is under way than the line holds at this rate: it waits somewhere.
    private var isFullLine: Bool { bytesPending >= max(1 << 20, path.product / 2 * 3) }

    /// On a long line a connection is bounded by its window, and more of them may carry more.
    private func grow(_ now: ContinuousClock.Instant) {
        guard growth.mayExceed(lanes.count), !isGrowing, !isResting, let roundTrip = path.roundTrip,
            roundTrip >= PathEstimate.long
        else { return }
        let wanted = growth.observe(
            counters.bytesSent,
            isWanted: isFullLine,
            count: lanes.count,
            roundTrip: roundTrip,
            now: now
        )
        guard wanted > 0 else { return }
        isGrowing = true
        Task(executorPreference: loop) {
            await self.add(wanted)
            self.isGrowing = false
        }
    }

    private func add(_ count: Int) async {
        let epoch = target.epoch
        guard let made = try? await target.connectMore(count, on: loop) else {
            return growth.forget(counters.bytesSent, now: .now)
        }
        // Those that they are to stand beside may have been lost meanwhile, and with them the life of the export.
        let isSame = made.allSatisfy { one in
            var info = one.info
            (info.name, info.summary) = (first.name, first.summary)
            return info == first && (one.info.summary ?? "") == generation && one.tls?.peer == identity
                && one.failure == nil
        }
        guard epoch == target.epoch, !lanes.isEmpty, failure == nil, !isResting, isSame else {
            for one in made { one.abort(ChannelError(.closed, "The connections of the mirror have changed meanwhile")) }
            return growth.forget(counters.bytesSent, now: .now)
        }
        lanes += made.map(MirrorLane.init)
        target.connections = lanes.count
        watch(made)
        pump()
    }

    private func acknowledged(_ change: DiskChange) {
        guard pending.removeValue(forKey: change.id) != nil else { return }
        bytesPending -= change.bytes
        counters.inFlight(bytesPending)
        if !change.isRepeated {
            if change.isData {
                counters.sent(change.bytes)
            } else if change.kind != .trim {
                counters.zeroed(UInt64(change.range.count))
            }
        }
        retained.append(change)
        makeDurable(now: false)
        if !queue.isEmpty { pump() }
        changed.signal()
    }

    private func failed(_ change: DiskChange, _ error: NBDError, isLost: Bool) {
        guard failure == nil, pending[change.id] != nil else { return }
        // What is under way can be sent again: each change says what a range shall be.
        if isLost || error.number == .noSpace {
            let index = queue.firstIndex { $0.id > change.id } ?? queue.count
            queue.insert(change, at: index)
            if !isLost { waitForSpace(error.message) }
            changed.signal()
        } else {
            fail(error)
        }
    }

    /// Somebody may make space at the destination.
    private func waitForSpace(_ reason: String) {
        guard !isFull else { return }
        isFull = true
        beginOutage(reason)
        _ = loop.schedule(after: .milliseconds(500)) {
            self.isFull = false
            // One change shows whether there is space now.
            if let first = self.queue.first, let lane = self.idlest, !self.isUnderWay(first.range) {
                self.queue.removeFirst()
                self.isFull = true
                lane.send(first) { error, isLost in
                    self.isFull = false
                    if let error {
                        self.failed(first, error, isLost: isLost)
                    } else {
                        self.acknowledged(first)
                        self.endOutage()
                        self.pump()
                    }
                }
            } else {
                self.endOutage()
                self.pump()
            }
        }
    }

    // MARK: Durability

    /// Lets the destination make durable what it has, beside everything else, so that little has to be kept, and little sent
    /// again.
    private func makeDurable(now: Bool) {
        guard failure == nil, retained.countUncovered > 0, let lane = idlest else { return }
        let limit = doubtLimit
        if retained.flushes == 0 {
            guard now || retained.bytes >= limit / 4 || retained.count >= 4096 else { return }
        } else {
            // More than one at a time is of use where the answer is long under way, and not the disk slow.
            guard limit > shortDoubt, retained.flushes < 8, retained.uncovered >= limit / 8 else { return }
        }
        let mark = retained.beginFlush()
        lane.flush { error, isLost in
            self.retained.endFlush(mark, isDurable: error == nil)
            if let error, !isLost { self.fail(error) }
            self.changed.signal()
        }
    }

    func flush() async throws {
        try check()
        if hasBarrier { return }
        // Everything acknowledged to QEMU before this flush must be at the destination before it is made durable.
        let last = nextID
        while true {
            while idlest == nil || pending.keys.contains(where: { $0 <= last }) {
                await changed.wait()
                try check()
            }
            guard let lane = idlest else { continue }
            let mark = retained.beginFlush()
            let (error, isLost) = await withUnsafeContinuation {
                (continuation: UnsafeContinuation<(NBDError?, Bool), Never>) in
                lane.flush { continuation.resume(returning: ($0, $1)) }
            }
            let isDurable = retained.endFlush(mark, isDurable: error == nil)
            changed.signal()
            try check()
            if let error, !isLost {
                fail(error)
                throw error
            }
            if isDurable { return }
        }
    }

    // MARK: BackEnd

    func tryRead(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws -> Bool { false }

    func read(into payload: Payload, at offset: UInt64) async throws {
        let range = offset..<(offset + UInt64(payload.count))
        while true {
            try check()
            guard !overlaps(range), let connection = idlest?.connection else {
                await changed.wait()
                continue
            }
            do { return try await connection.read(into: payload, at: offset) } catch let error as NBDError {
                if connection.failure == nil { throw error }
            }
        }
    }

    private func change(_ payload: Payload, at offset: UInt64) -> DiskChange {
        let range = offset..<(offset + UInt64(payload.count))
        let change = DiskChange(makeID(), .write, range, payload: payload)
        change.wasZero = sums.didWrite(payload.bytes, at: offset)
        return change
    }

    func tryWrite(_ payload: Payload, at offset: UInt64, fua: Bool) throws -> Bool {
        try check()
        if payload.count == 0 { return true }
        let range = offset..<(offset + UInt64(payload.count))
        guard !fua, limit == nil, endurance.beacon?.isRaised != true, queue.isEmpty, hasRoom(payload.count),
            !overlaps(range),
            seed?.isReached(range) ?? true
        else { return false }
        _ = begin(payload, at: offset)
        return true
    }

    func write(_ payload: Payload, at offset: UInt64, fua: Bool) async throws {
        let range = offset..<(offset + UInt64(payload.count))
        await giveWay()
        if let seed {
            await seed.reach(range)
            try check()
        }
        try await admit(range, bytes: payload.count)
        let sent = begin(payload, at: offset)
        if let limit, sent > 0 { await wait(for: limit.take(sent)) }
        if fua { try await flush() }
    }

    /// Waits while another guest of this host is paused.
    private func giveWay() async {
        guard let beacon = endurance.beacon else { return }
        while beacon.isRaised, failure == nil { await loop.sleep(for: .milliseconds(2)) }
    }

    /// Begins a write, without what the destination has.
    ///
    /// - Returns: how many bytes are sent.
    private func begin(_ payload: Payload, at offset: UInt64) -> Int {
        guard let seed else {
            begin(change(payload, at: offset))
            return payload.count
        }
        var sent = 0
        for part in seed.split(payload.bytes, at: offset) {
            let piece = payload.part(Int(part.range.lowerBound - offset)..<Int(part.range.upperBound - offset))
            if part.isThere {
                _ = sums.didWrite(piece.bytes, at: part.range.lowerBound)
                counters.seeded(UInt64(piece.count))
            } else {
                begin(change(piece, at: part.range.lowerBound))
                sent += piece.count
            }
        }
        return sent
    }

    /// Sleeps, but not beyond the end of the mirror, nor of its copy.
    private func wait(for time: Duration) async {
        let end = ContinuousClock.now + time
        while failure == nil, !isResting, ContinuousClock.now < end {
            await loop.sleep(for: min(.milliseconds(50), end - .now))
        }
    }

    private func perform(_ kind: DiskChange.Kind, _ offset: UInt64, _ count: UInt64, mayDeallocate: Bool) async throws {
        var done: UInt64 = 0
        while done < count {
            let part = min(count - done, 1 << 30)
            let range = (offset + done)..<(offset + done + part)
            try await admitEmptying(range)
            begin(kind, range, mayDeallocate: mayDeallocate)
            done += part
        }
    }

    /// Waits until a range may be zeroed or trimmed: such a request is short on the line, and may be long at work.
    private func admitEmptying(_ range: Range<UInt64>) async throws {
        try await admit(range, bytes: 0)
        while pending.values.count(where: { $0.kind != .write }) >= Self.mostEmptying {
            await changed.wait()
            try await admit(range, bytes: 0)
        }
    }

    /// Begins a change that was admitted. QEMU 7.2 has all of an empty disk zeroed before it copies anything, two pieces of 32 MiB at a time: were each
    /// waited for, a long line would do nothing else for minutes.
    private func begin(_ kind: DiskChange.Kind, _ range: Range<UInt64>, mayDeallocate: Bool) {
        if kind == .zero { sums.didZero(range) } else { sums.didForget(range) }
        begin(DiskChange(makeID(), kind, range, mayDeallocate: mayDeallocate))
    }

    func zero(at offset: UInt64, count: UInt64, _ options: ZeroOptions) async throws {
        if let seed {
            try await zero(offset..<(offset + count), seed)
        } else {
            try await perform(.zero, offset, count, mayDeallocate: options.contains(.mayDeallocate))
        }
        if options.contains(.fua) { try await flush() }
    }

    /// Zeroes what is not zero at the destination. QEMU, which may not empty a seeded disk first, does not say that holes will do; they do.
    private func zero(_ range: Range<UInt64>, _ seed: SeedFilter) async throws {
        await seed.reach(range)
        try check()
        try await admitEmptying(range)
        let parts = seed.splitZeroes(range)
        for part in parts where part.isThere {
            sums.didZero(part.range)
            counters.seeded(UInt64(part.range.count))
        }
        for part in parts where !part.isThere {
            try await admitEmptying(part.range)
            begin(.zero, part.range, mayDeallocate: true)
        }
    }

    func trim(at offset: UInt64, count: UInt64, fua: Bool) async throws {
        seed?.didChange(offset..<(offset + count))
        try await perform(.trim, offset, count, mayDeallocate: true)
        if fua { try await flush() }
    }

    func extents(at offset: UInt64, count: UInt64, limit: Int) async throws -> [Extent] {
        [Extent(length: count, isHole: false, isZero: false)]
    }
}
