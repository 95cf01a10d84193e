internal import CLinux
internal import Glibc
public import IO
internal import Synchronization

/// Copies a disk from one back end to another: files, devices, exports of NBD servers.
///
/// Any number of pieces are under way on any number of loops. Holes and zeroes are not read where the source says where they
/// are, and written as such where the target can.
public final class DiskCopy: Sendable {
    /// How to copy.
    public struct Options: Sendable {
        /// The longest read and write, in bytes; a power of two.
        public var requestSize = 1 << 20
        /// How many pieces are under way at once.
        public var requests = 16
        /// Zeroes in the data are found in blocks of so many bytes, a power of two; not at all when it is 0.
        public var sparse = 4096
        /// The target is known to be all zeroes.
        public var targetIsZero = false
        /// Zeroes are allocated at the target.
        public var allocates = false
        /// The target may have much of it already: it is read, and only blocks that differ are written.
        public var comparesTarget = false
        /// The source is asked where its holes are.
        public var usesExtents = true
        /// A context of dirty bits: only what it marks is copied, and the target has the rest already.
        public var changes: String?
        /// The target is made durable at the end.
        public var flushes = true
        /// The most that is moved, in bytes a second; no bound when it is nil.
        public var bandwidth: UInt64?
        /// Where the copy begins, in bytes.
        public var position: UInt64 = 0
        /// After about so many bytes the target is made durable, and `onCheckpoint` told; only at the end when it is nil. What is
        /// durable does not have to be copied again when a connection is lost.
        public var checkpoint: UInt64?

        /// The defaults.
        public init() {}
    }

    /// What was moved.
    public struct Summary: Sendable, Equatable {
        /// Bytes that were read as data.
        public var read: UInt64 = 0
        /// Bytes that were written as data.
        public var written: UInt64 = 0
        /// Bytes that were left out or written as zeroes.
        public var zeroes: UInt64 = 0
        /// Bytes that the target had already.
        public var present: UInt64 = 0
    }

    /// Up to where the target is durable, and who makes it so.
    private struct Durability {
        var position: UInt64
        /// One flush at a time: what one of them finds lost, another must not take for kept.
        var isFlushing = false
        /// Losses since the position last moved.
        var losses = 0
    }

    private final class FirstDifference: Sendable {
        // Not an atomic minimum: in Swift 6.3 that of an unsigned integer compares as if it were signed.
        let offset = Guarded<UInt64?>(nil)

        func note(_ found: UInt64) { offset.withLock { $0 = min($0 ?? found, found) } }
    }

    private let source: any BackEnd
    private let target: any BackEnd
    private let options: Options
    /// The unit of requests at both ends.
    private let granule: UInt64
    private let plan: CopyPlan
    private let limit: RateLimit?
    private let size: UInt64
    private let read = Atomic<UInt64>(0)
    private let written = Atomic<UInt64>(0)
    private let zeroes = Atomic<UInt64>(0)
    private let present = Atomic<UInt64>(0)
    private let pool: BufferPool
    private let durability: Guarded<Durability>

    /// Prepares a copy.
    ///
    /// - Throws: `ChannelError` when the target is too small or read-only.
    public init(from source: any BackEnd, to target: any BackEnd, _ options: Options) throws {
        guard target.size >= source.size else {
            throw ChannelError(
                .system,
                "The target has \(target.size) bytes, and the source has \(source.size): it does not fit"
            )
        }
        granule = UInt64(max(source.traits.blockSizes.minimum, target.traits.blockSizes.minimum))
        guard
            source.size % UInt64(target.traits.blockSizes.minimum) == 0 || target.size == source.size
                || target.traits.blockSizesAreAssumed
        else {
            throw ChannelError(
                .system,
                "The source has \(source.size) bytes, and the larger target takes only blocks of "
                    + "\(target.traits.blockSizes.minimum): the end of the source does not fit into them"
            )
        }
        guard !target.isReadOnly else { throw ChannelError(.system, "The target is read-only") }
        self.source = source
        self.target = target
        self.options = options
        size = source.size
        let largest = min(source.traits.blockSizes.maximum, target.traits.blockSizes.maximum)
        let piece = min(options.requestSize, Int(largest.leadingPowerOfTwo))
        plan = CopyPlan(
            source: source,
            size: size,
            from: options.position,
            pieceSize: max(UInt64(piece), 4096, granule),
            granule: granule,
            usesExtents: options.usesExtents,
            changes: options.changes
        )
        limit = options.bandwidth.map { RateLimit(bytesPerSecond: $0) }
        pool = BufferPool(keep: 64 << 20)
        durability = Guarded(Durability(position: options.position))
    }

    /// What was moved so far; from any thread.
    public var summary: Summary {
        Summary(
            read: read.load(ordering: .relaxed),
            written: written.load(ordering: .relaxed),
            zeroes: zeroes.load(ordering: .relaxed),
            present: present.load(ordering: .relaxed)
        )
    }

    /// Up to where everything is copied, in bytes; from any thread.
    public var position: UInt64 { plan.lowWater }

    /// Copies.
    ///
    /// - Parameters:
    ///   - loops: where the work is done; for an NBD export those of its connections.
    ///   - onCheckpoint: gets the position up to which the target has everything on stable storage.
    /// - Throws: the first error; what was under way is finished before.
    public func run(
        on loops: [EventLoop],
        onCheckpoint: @escaping @Sendable (UInt64) throws -> Void = { _ in }
    ) async throws {
        // A flush may find that what was done is lost, and then there is more to do.
        while true {
            try await work(on: loops) {
                while let piece = try await self.plan.next() {
                    try await self.copy(piece)
                    try await self.checkpoint(onCheckpoint)
                }
            }
            guard options.flushes else { return }
            if try await loops[0].run({ try await self.makeDurable() }) == size { return }
        }
    }

    /// Runs workers on loops; when one of them fails, the others stop at their next piece.
    private func work(on loops: [EventLoop], _ body: @escaping @Sendable () async throws -> Void) async throws {
        try await withThrowingTaskGroup(of: Void.self) { group in
            for index in 0..<max(options.requests, loops.count) {
                group.addTask(executorPreference: loops[index % loops.count]) {
                    do { try await body() } catch {
                        self.plan.fail()
                        throw error
                    }
                }
            }
            try await group.waitForAll()
        }
    }

    /// Makes the target durable when it is time to, unless somebody does that already.
    private func checkpoint(_ onCheckpoint: @Sendable (UInt64) throws -> Void) async throws {
        guard let interval = options.checkpoint else { return }
        let position = plan.lowWater
        let isMine = durability.withLock { state in
            guard !state.isFlushing, position >= state.position + interval, position < size else { return false }
            state.isFlushing = true
            return true
        }
        guard isMine else { return }
        defer { durability.withLock { $0.isFlushing = false } }
        if let durable = try await makeDurable() { try onCheckpoint(durable) }
    }

    /// Flushes. Called by one worker at a time.
    ///
    /// - Returns: the position up to which the target is durable; nil when lost connections have put in doubt what was done since
    ///   the last time, which is then done again.
    private func makeDurable() async throws -> UInt64? {
        let position = plan.lowWater
        guard let remote = target as? ClientBackEnd else {
            try await target.flush()
            durability.withLock { $0.position = position }
            return position
        }
        let isKept = try await remote.flushUnlessLost()
        let (back, losses) = durability.withLock { state in
            if isKept { (state.position, state.losses) = (position, 0) } else { state.losses += 1 }
            return (state.position, state.losses)
        }
        if isKept { return position }
        guard losses <= 8 else {
            throw NBDError(.io, "The connection to the target is lost again and again before anything is durable there")
        }
        plan.rewind(to: back)
        return nil
    }

    private func copy(_ piece: CopyPlan.Piece) async throws {
        if piece.isUnchanged {
            plan.finish(piece)
            return
        }
        if piece.isZero {
            if options.comparesTarget {
                try await zeroWhatIsNot(piece)
            } else {
                try await zero(at: piece.offset, count: piece.count)
            }
            plan.finish(piece)
            return
        }
        let count = Int(piece.count)
        if let limit {
            let delay = limit.take(count)
            if delay > .zero { try await Task.sleep(for: delay) }
        }
        let buffer = pool.buffer(count)
        let data = Payload(buffer, 0..<count)
        try await source.readFully(into: data, at: piece.offset)
        read.wrappingAdd(UInt64(count), ordering: .relaxed)
        if options.comparesTarget {
            try await writeWhatDiffers(data, at: piece.offset)
        } else {
            try await write(data, at: piece.offset)
        }
        plan.finish(piece)
    }

    /// Blocks in which the target is compared, in bytes.
    private var comparedBlock: Int { max(64 << 10, Int(granule)) }

    private func writeWhatDiffers(_ data: Payload, at offset: UInt64) async throws {
        let there = Payload(pool.buffer(data.count), 0..<data.count)
        try await target.readFully(into: there, at: offset)
        func differs(_ block: Range<Int>) -> Bool {
            memcmp(there.bytes.baseAddress! + block.lowerBound, data.bytes.baseAddress! + block.lowerBound, block.count)
                != 0
        }
        func block(at position: Int) -> Range<Int> { position..<min(position + comparedBlock, data.count) }
        var start = 0
        while start < data.count {
            let isDifferent = differs(block(at: start))
            var end = block(at: start).upperBound
            while end < data.count, differs(block(at: end)) == isDifferent { end = block(at: end).upperBound }
            if isDifferent {
                try await write(data.part(start..<end), at: offset + UInt64(start))
            } else {
                present.wrappingAdd(UInt64(end - start), ordering: .relaxed)
            }
            start = end
        }
    }

    private func zeroWhatIsNot(_ piece: CopyPlan.Piece) async throws {
        var position = piece.offset
        let end = piece.offset + piece.count
        while position < end {
            for extent in try await target.extents(at: position, count: end - position, limit: 4096) {
                let length = min(extent.length, end - position)
                if extent.isZero, !options.allocates {
                    present.wrappingAdd(length, ordering: .relaxed)
                } else {
                    try await zero(at: position, count: length)
                }
                position += length
            }
        }
    }

    private func write(_ data: Payload, at offset: UInt64) async throws {
        var start = 0
        var position = 0
        let bytes = data.bytes
        let step = options.sparse == 0 ? 0 : max(options.sparse, Int(granule))
        // Runs of zeroes and of data, in blocks.
        while step > 0, position < data.count {
            let end = min(data.count, position + step)
            guard Self.isZero(bytes, position..<end) else {
                position = end
                continue
            }
            if start < position { try await writeData(data.part(start..<position), at: offset + UInt64(start)) }
            var zeroEnd = end
            while zeroEnd < data.count, Self.isZero(bytes, zeroEnd..<min(data.count, zeroEnd + step)) {
                zeroEnd = min(data.count, zeroEnd + step)
            }
            try await zero(at: offset + UInt64(position), count: UInt64(zeroEnd - position))
            start = zeroEnd
            position = zeroEnd
        }
        if start < data.count { try await writeData(data.part(start..<data.count), at: offset + UInt64(start)) }
    }

    private static func isZero(_ bytes: UnsafeRawBufferPointer, _ range: Range<Int>) -> Bool {
        xd_is_zero(bytes.baseAddress! + range.lowerBound, range.count) != 0
    }

    private func writeData(_ data: Payload, at offset: UInt64) async throws {
        if try !target.tryWrite(data, at: offset, fua: false) { try await target.write(data, at: offset, fua: false) }
        written.wrappingAdd(UInt64(data.count), ordering: .relaxed)
    }

    private func zero(at offset: UInt64, count: UInt64) async throws {
        zeroes.wrappingAdd(count, ordering: .relaxed)
        if options.targetIsZero, !options.allocates { return }
        try await target.zero(at: offset, count: count, options.allocates ? [] : [.mayDeallocate])
    }

    /// Reads both ends and compares them.
    ///
    /// - Returns: where they differ first; nil when they do not.
    public func verify(on loops: [EventLoop]) async throws -> UInt64? {
        let plan = CopyPlan(
            source: source,
            size: size,
            from: 0,
            pieceSize: 1 << 20,
            granule: granule,
            usesExtents: options.usesExtents
        )
        let first = FirstDifference()
        try await work(on: loops) {
            do {
                while let piece = try await plan.next() {
                    if let difference = try await self.difference(piece) {
                        first.note(difference)
                    }
                }
            } catch {
                plan.fail()
                throw error
            }
        }
        return first.offset.withLock { $0 }
    }

    private func difference(_ piece: CopyPlan.Piece) async throws -> UInt64? {
        var done: UInt64 = 0
        while done < piece.count {
            let count = Int(min(1 << 20, piece.count - done))
            let offset = piece.offset + done
            done += UInt64(count)
            let mine = Payload(pool.buffer(count), 0..<count)
            try await target.readFully(into: mine, at: offset)
            if piece.isZero {
                if xd_is_zero(mine.bytes.baseAddress, count) == 0 {
                    return offset + UInt64(mine.bytes.firstIndex { $0 != 0 } ?? 0)
                }
                continue
            }
            let theirs = Payload(pool.buffer(count), 0..<count)
            try await source.readFully(into: theirs, at: offset)
            if memcmp(mine.bytes.baseAddress!, theirs.bytes.baseAddress!, count) != 0 {
                return offset + UInt64(zip(mine.bytes, theirs.bytes).enumerated().first { $1.0 != $1.1 }?.offset ?? 0)
            }
        }
        return nil
    }
}

extension UInt32 {
    /// The greatest power of two that is not greater.
    fileprivate var leadingPowerOfTwo: UInt32 { self == 0 ? 0 : 1 << (31 - UInt32(leadingZeroBitCount)) }
}
