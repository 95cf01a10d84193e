internal import IO

/// What a copy still has to do, in pieces, for any number of workers; and how far it has got without a gap.
///
/// Extents are asked for as the pieces run out, by the worker that finds none; the others wait meanwhile.
final class CopyPlan: Sendable {
    struct Piece: Sendable, Equatable {
        let offset: UInt64
        let count: UInt64
        /// Whether the source has nothing but zeroes there.
        let isZero: Bool
        /// Whether the target has it already.
        var isUnchanged = false
        /// Pieces of an earlier pass, before a rewind, count no more.
        let pass: Int
    }

    private struct State {
        var pieces: [Piece] = []
        var head = 0
        var position: UInt64
        var pass = 0
        var isFetching = false
        var failed = false
        var waiting: [UnsafeContinuation<Void, Never>] = []
        /// Up to here everything is done.
        var lowWater: UInt64
        /// What is done beyond, by its beginning.
        var islands: [UInt64: UInt64] = [:]
    }

    private let state: Guarded<State>
    private let size: UInt64
    private let pieceSize: UInt64
    private let source: any BackEnd
    private let usesExtents: Bool
    /// The context that tells what has changed; nil when everything is copied.
    private let changes: String?
    /// Pieces begin and end at multiples of this, but for the end of the disk.
    private let granule: UInt64
    /// How much of the source is asked about at once.
    private static let span: UInt64 = 1 << 30

    init(
        source: any BackEnd,
        size: UInt64,
        from position: UInt64,
        pieceSize: UInt64,
        granule: UInt64,
        usesExtents: Bool,
        changes: String? = nil
    ) {
        self.changes = changes
        self.granule = granule
        self.source = source
        self.size = size
        self.pieceSize = pieceSize
        self.usesExtents = usesExtents
        state = Guarded(State(position: position, lowWater: position))
    }

    private enum Step {
        case piece(Piece)
        case fetch(UInt64, Int)
        case wait
        case done
    }

    /// The next piece; nil when there is none.
    func next() async throws -> Piece? {
        while true {
            let step = state.withLock { state -> Step in
                if state.failed { return .done }
                if state.head < state.pieces.count {
                    defer { state.head += 1 }
                    return .piece(state.pieces[state.head])
                }
                if state.isFetching { return .wait }
                if state.position >= size { return .done }
                state.isFetching = true
                return .fetch(state.position, state.pass)
            }
            switch step {
            case .piece(let piece): return piece
            case .done: return nil
            case .wait:
                await withUnsafeContinuation { continuation in
                    let isOver = state.withLock { state in
                        if !state.isFetching { return true }
                        state.waiting.append(continuation)
                        return false
                    }
                    if isOver { continuation.resume() }
                }
            case .fetch(let position, let pass):
                do {
                    store(try await fetch(position), at: position, pass)
                } catch {
                    fail()
                    throw error
                }
            }
        }
    }

    private func fetch(_ position: UInt64) async throws -> [Extent] {
        let count = min(size - position, Self.span)
        if let changes {
            // What is not dirty is treated like zeroes: at the edges it only shrinks.
            let found = try await source.extents(of: changes, at: position, count: count, limit: 4096).map { extent in
                Extent(length: extent.length, isHole: false, isZero: extent.flags & 1 == 0)
            }
            return found.isEmpty ? [Extent(length: count, isHole: false, isZero: false)] : found
        }
        guard usesExtents else { return [Extent(length: count, isHole: false, isZero: false)] }
        let found = try await source.extents(at: position, count: count, limit: 4096)
        return found.isEmpty ? [Extent(length: count, isHole: false, isZero: false)] : found
    }

    private func store(_ extents: [Extent], at position: UInt64, _ pass: Int) {
        let waiting = state.withLock { state in
            state.isFetching = false
            defer { state.waiting = [] }
            guard state.pass == pass else { return state.waiting }
            state.pieces.removeAll(keepingCapacity: true)
            state.head = 0
            var offset = position
            for (end, isZero) in aligned(extents, from: position) {
                while offset < end {
                    // Pieces end at multiples of their size, so that requests stay aligned after a short extent.
                    let limit = isZero ? end : (offset / pieceSize + 1) * pieceSize
                    let count = min(end, limit) - offset
                    state.pieces.append(
                        Piece(
                            offset: offset,
                            count: count,
                            isZero: isZero && changes == nil,
                            isUnchanged: isZero && changes != nil,
                            pass: pass
                        )
                    )
                    offset += count
                }
            }
            state.position = offset
            return state.waiting
        }
        for continuation in waiting { continuation.resume() }
    }

    /// The ends of the extents, moved to multiples of the granule so that zeroes only shrink.
    private func aligned(_ extents: [Extent], from position: UInt64) -> [(end: UInt64, isZero: Bool)] {
        var result: [(end: UInt64, isZero: Bool)] = []
        var offset = position
        for (index, extent) in extents.enumerated() {
            offset = min(offset + extent.length, size)
            var end = offset
            var isZero = extent.isZero
            if end % granule != 0, end != size {
                let down = end / granule * granule
                let up = min(down + granule, size)
                if index == extents.count - 1 {
                    // What lies behind is not known yet; it is asked about again, from a boundary on.
                    let fits = down > (result.last?.end ?? position)
                    end = fits ? down : up
                    // Only a part of this granule is known.
                    if !fits { isZero = false }
                } else {
                    end = extent.isZero ? down : up
                }
            }
            let start = result.last?.end ?? position
            guard end > start else { continue }
            // A piece that is zero only in part is data.
            let isPartly = end - start < granule && end != size
            result.append((end, isZero && !isPartly))
        }
        return result
    }

    /// Gives up: no worker gets a piece any more.
    func fail() {
        let waiting = state.withLock { state in
            state.failed = true
            state.isFetching = false
            defer { state.waiting = [] }
            return state.waiting
        }
        for continuation in waiting { continuation.resume() }
    }

    /// A piece is done.
    func finish(_ piece: Piece) {
        state.withLock { state in
            guard piece.pass == state.pass else { return }
            if piece.offset != state.lowWater {
                state.islands[piece.offset] = piece.offset + piece.count
                return
            }
            state.lowWater = piece.offset + piece.count
            while let end = state.islands.removeValue(forKey: state.lowWater) { state.lowWater = end }
        }
    }

    /// Up to where everything is done.
    var lowWater: UInt64 { state.withLock { $0.lowWater } }

    /// Does everything from a position on again: what was done there may be lost.
    func rewind(to position: UInt64) {
        state.withLock { state in
            state.pass += 1
            state.pieces.removeAll()
            state.head = 0
            state.position = position
            state.lowWater = position
            state.islands.removeAll()
        }
    }
}
