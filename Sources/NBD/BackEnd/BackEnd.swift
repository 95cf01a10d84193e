public import IO

/// Bytes of a request's payload. Who needs them beyond the call keeps the payload, whose buffer then stays alive.
public struct Payload: Sendable {
    /// The memory.
    public let buffer: IOBuffer
    /// The part of it that is meant.
    public let range: Range<Int>

    /// Makes a payload.
    public init(_ buffer: IOBuffer, _ range: Range<Int>) {
        self.buffer = buffer
        self.range = range
    }

    /// How many bytes.
    public var count: Int { range.count }
    /// The bytes, to read.
    public var bytes: UnsafeRawBufferPointer { buffer.bytes(range) }
}

/// What an export serves: a file, a device, another server.
///
/// The `try...` calls never block: they return false when the work must wait, and the server then awaits the other
/// form. Ranges are within `size`, the server has checked them. Several calls may be under way at once; a completed
/// write is seen by every later read on any connection.
public protocol BackEnd: AnyObject, Sendable {
    /// How many bytes there are.
    var size: UInt64 { get }
    /// Whether writes are refused.
    var isReadOnly: Bool { get }

    /// Reads if it can be done at once.
    func tryRead(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws -> Bool
    /// Reads.
    func read(into payload: Payload, at offset: UInt64) async throws
    /// Writes if it can be done at once.
    func tryWrite(_ payload: Payload, at offset: UInt64, fua: Bool) throws -> Bool
    /// Writes.
    func write(_ payload: Payload, at offset: UInt64, fua: Bool) async throws
    /// Makes a range read as zeroes; deallocates it unless told not to.
    func zero(at offset: UInt64, count: UInt64, mayDeallocate: Bool, fua: Bool) async throws
    /// Discards a range; a hint.
    func trim(at offset: UInt64, count: UInt64, fua: Bool) async throws
    /// Makes all completed writes durable.
    func flush() async throws
    /// What a range consists of: at least one extent, at most `limit`, from `offset` on, not beyond `count`.
    func extents(at offset: UInt64, count: UInt64, limit: Int) async throws -> [Extent]
}
