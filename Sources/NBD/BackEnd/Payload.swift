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
    /// The bytes, to write.
    public var mutable: UnsafeMutableRawBufferPointer { buffer.mutable(range) }

    /// A part of it, by offsets from its beginning.
    public func part(_ part: Range<Int>) -> Payload {
        Payload(buffer, (range.lowerBound + part.lowerBound)..<(range.lowerBound + part.upperBound))
    }
}
