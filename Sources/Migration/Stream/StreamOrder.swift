internal import IO

/// In which order the pieces of a stream that several connections bring are passed on, and what no honest peer sends. A value without I/O.
///
/// A connection brings its pieces in rising order, one at a time, and holds the next one until that was passed on: what waits is bounded by
/// the number of connections.
public struct StreamOrder: Sendable {
    /// The piece that is passed on next.
    public private(set) var next: UInt64 = 0
    private var waiting: Set<UInt64> = []
    private var isPassing = false
    private var lanes = 0
    private var ended = 0
    private var total: UInt64?

    /// Nothing has come yet.
    public init() {}

    /// Whether everything was passed on and nothing more comes.
    public var isOver: Bool { lanes > 0 && ended == lanes && total == next && !isPassing }

    /// A connection joins.
    ///
    /// - Throws: `ChannelError` with `protocolViolation` for one too many, or after an end was told.
    public mutating func join() throws {
        guard lanes < StreamPiece.mostLanes else {
            throw violation("more than \(StreamPiece.mostLanes) connections bring it")
        }
        guard total == nil else { throw violation("a connection joins after its end") }
        lanes += 1
    }

    /// A connection has brought a piece.
    ///
    /// - Returns: whether it is to be passed on at once; otherwise it waits for its turn.
    /// - Throws: `ChannelError` with `protocolViolation` for a piece that was there before, that is beyond the end, or whose predecessors
    ///   nobody can bring any more.
    public mutating func arrived(_ number: UInt64) throws -> Bool {
        guard number > next || (number == next && !isPassing), !waiting.contains(number) else {
            throw violation("piece \(number) comes twice")
        }
        if let total, number >= total { throw violation("piece \(number) comes beyond its end at \(total)") }
        if number == next {
            isPassing = true
            return true
        }
        waiting.insert(number)
        try checkForGap()
        return false
    }

    /// The piece whose turn it was is passed on.
    ///
    /// - Returns: the one that has waited for that, if it is there.
    /// - Throws: as `arrived`.
    public mutating func passed() throws -> UInt64? {
        isPassing = false
        next += 1
        guard waiting.remove(next) != nil else {
            try checkForGap()
            return nil
        }
        isPassing = true
        return next
    }

    /// A connection has brought its last piece.
    ///
    /// - Parameter count: how many pieces there are altogether.
    /// - Throws: `ChannelError` with `protocolViolation` when others say otherwise, or pieces are missing that nobody can bring any more.
    public mutating func ended(_ count: UInt64) throws {
        guard total == nil || total == count else {
            throw violation("it has \(count) pieces on one connection and \(total ?? 0) on another")
        }
        guard waiting.allSatisfy({ $0 < count }), next + (isPassing ? 1 : 0) <= count else {
            throw violation("its end at \(count) is before pieces that are here")
        }
        total = count
        ended += 1
        try checkForGap()
    }

    /// Each connection that has not ended holds one piece at most: when all of them wait, nobody can bring the next one.
    private func checkForGap() throws {
        guard !isPassing, !isOver else { return }
        if waiting.count + ended >= lanes { throw violation("piece \(next) is missing") }
    }

    private func violation(_ what: String) -> ChannelError {
        ChannelError(.protocolViolation, "The migration stream is out of order: \(what)")
    }
}
