/// A disk that forgets what is written and reads as zeroes, as large as wanted.
public final class NullDisk: BackEnd {
    /// How many bytes there are.
    public let size: UInt64
    /// Writes are taken.
    public let isReadOnly = false

    /// Makes a disk.
    public init(size: UInt64) { self.size = size }

    /// Zeroes.
    public func tryRead(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws -> Bool {
        buffer.initializeMemory(as: UInt8.self, repeating: 0)
        return true
    }
    /// Zeroes.
    public func read(into payload: Payload, at offset: UInt64) async throws {
        _ = try tryRead(into: payload.mutable, at: offset)
    }
    /// Forgets.
    public func tryWrite(_ payload: Payload, at offset: UInt64, fua: Bool) throws -> Bool { true }
    /// Forgets.
    public func write(_ payload: Payload, at offset: UInt64, fua: Bool) async throws {}
    /// Is zero already.
    public func zero(at offset: UInt64, count: UInt64, _ options: ZeroOptions) async throws {}
    /// Is empty already.
    public func trim(at offset: UInt64, count: UInt64, fua: Bool) async throws {}
    /// Has nothing to keep.
    public func flush() async throws {}
    /// One hole.
    public func extents(at offset: UInt64, count: UInt64, limit: Int) async throws -> [Extent] {
        [Extent(length: count, isHole: true, isZero: true)]
    }
}
