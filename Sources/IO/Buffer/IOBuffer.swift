internal import Glibc

/// A piece of memory with a fixed address, for I/O that spans suspensions.
///
/// The memory is released with the last reference, or goes back to the pool it came from.
public final class IOBuffer: @unchecked Sendable {
    // Unchecked: whoever holds the buffer's range writes it, then hands it over; no two tasks use a range at once.
    private let base: UnsafeMutableRawPointer
    /// How many bytes there are.
    public let capacity: Int
    private let pool: BufferPool?

    /// Makes a buffer with undefined contents, aligned for direct I/O when it is a page or more.
    public init(capacity: Int) {
        self.capacity = capacity
        base = .allocate(byteCount: capacity, alignment: capacity >= 4096 ? 4096 : 16)
        pool = nil
    }

    init(base: UnsafeMutableRawPointer, capacity: Int, pool: BufferPool) {
        self.base = base
        self.capacity = capacity
        self.pool = pool
    }

    /// Makes a buffer that holds a copy of `bytes`.
    public convenience init(copying bytes: some Collection<UInt8>) {
        self.init(capacity: max(bytes.count, 1))
        mutable(0..<bytes.count).copyBytes(from: bytes)
    }

    deinit {
        if let pool { pool.giveBack(base, capacity) } else { base.deallocate() }
    }

    /// The bytes of a range, to read.
    public func bytes(_ range: Range<Int>) -> UnsafeRawBufferPointer {
        precondition(range.upperBound <= capacity, "a range outside the buffer")
        return UnsafeRawBufferPointer(start: base + range.lowerBound, count: range.count)
    }

    /// The bytes of a range, to write.
    public func mutable(_ range: Range<Int>) -> UnsafeMutableRawBufferPointer {
        precondition(range.upperBound <= capacity, "a range outside the buffer")
        return UnsafeMutableRawBufferPointer(start: base + range.lowerBound, count: range.count)
    }
}
