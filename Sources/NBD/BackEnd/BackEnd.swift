/// How zeroes are to be written (NBD specification, NBD_CMD_WRITE_ZEROES).
public struct ZeroOptions: OptionSet, Sendable {
    /// The bits.
    public let rawValue: UInt8
    /// Makes a set from bits.
    public init(rawValue: UInt8) { self.rawValue = rawValue }
    /// The range may become a hole.
    public static let mayDeallocate = ZeroOptions(rawValue: 1 << 0)
    /// Fail with `NBDError.Number.notSupported`, with nothing changed, rather than take as long as a write.
    public static let fast = ZeroOptions(rawValue: 1 << 1)
    /// Return once the zeroes are durable.
    public static let fua = ZeroOptions(rawValue: 1 << 2)
}

/// What a back end can do, as it is told to clients.
public struct BackEndTraits: Sendable {
    /// The sizes of requests that it takes; the server refuses others.
    public var blockSizes = BlockSizes()
    /// Whether `blockSizes` is only what is safe with a server that did not say: it should take single bytes, too (NBD specification,
    /// "Size constraints").
    public var blockSizesAreAssumed = false
    /// Whether the medium turns.
    public var isRotational = false
    /// Whether `ZeroOptions.fast` is understood.
    public var hasFastZero = false
    /// Whether TRIM does anything.
    public var hasTrim = true
    /// Whether `cache` does anything.
    public var hasCache = false
    /// Whether one flush covers the completed writes of every user.
    public var isConsistent = true
    /// The metadata contexts that it knows, `base:allocation` first when it knows that.
    public var contexts = [MetaContext.allocation]

    /// The traits of something simple.
    public init() {}
}

/// What an export serves: a file, a device, memory, another server.
///
/// The `try...` calls never block: they return false when the work must wait, and the server then awaits the other
/// form. Ranges are within `size` and aligned to the minimum block, the server has checked them. Several calls may be under
/// way at once; a completed write is seen by every later read on any connection.
public protocol BackEnd: AnyObject, Sendable {
    /// How many bytes there are.
    var size: UInt64 { get }
    /// Whether writes are refused.
    var isReadOnly: Bool { get }
    /// What it can do; does not change.
    var traits: BackEndTraits { get }

    /// Reads if it can be done at once.
    func tryRead(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws -> Bool
    /// Reads.
    func read(into payload: Payload, at offset: UInt64) async throws
    /// Writes if it can be done at once.
    func tryWrite(_ payload: Payload, at offset: UInt64, fua: Bool) throws -> Bool
    /// Writes.
    func write(_ payload: Payload, at offset: UInt64, fua: Bool) async throws
    /// Makes a range read as zeroes.
    func zero(at offset: UInt64, count: UInt64, _ options: ZeroOptions) async throws
    /// Discards a range; a hint.
    func trim(at offset: UInt64, count: UInt64, fua: Bool) async throws
    /// Brings a range close; a hint.
    func cache(at offset: UInt64, count: UInt64) async throws
    /// Makes all completed writes durable.
    func flush() async throws
    /// What a range consists of in the terms of `base:allocation`: at least one extent, at most `limit`, from `offset` on,
    /// not beyond `count`.
    func extents(at offset: UInt64, count: UInt64, limit: Int) async throws -> [Extent]
    /// The same in the terms of another context of `traits`.
    func extents(of context: String, at offset: UInt64, count: UInt64, limit: Int) async throws -> [Extent]
    /// Ends the use of whatever is behind it.
    func close() async
}

extension BackEnd {
    /// Reads at once if that can be done, and waits otherwise.
    public func readFully(into payload: Payload, at offset: UInt64) async throws {
        if try !tryRead(into: payload.mutable, at: offset) { try await read(into: payload, at: offset) }
    }
    /// Those of something simple.
    public var traits: BackEndTraits { BackEndTraits() }
    /// Does nothing.
    public func cache(at offset: UInt64, count: UInt64) async throws {}
    /// Does nothing.
    public func close() async {}
    /// Knows no other context than `base:allocation`.
    public func extents(
        of context: String,
        at offset: UInt64,
        count: UInt64,
        limit: Int
    ) async throws -> [Extent] {
        guard context == MetaContext.allocation else {
            throw NBDError(.invalid, "The context \(context) is not known here")
        }
        return try await extents(at: offset, count: count, limit: limit)
    }
}
