internal import Glibc

/// A bounded first-in, first-out queue of bytes in one piece of memory.
public struct ByteFIFO: ~Copyable {
    private var base: UnsafeMutableRawPointer
    private var head = 0
    private var tail = 0
    /// How many bytes the memory holds.
    public private(set) var capacity: Int

    /// Makes an empty queue.
    public init(capacity: Int) {
        self.capacity = capacity
        base = .allocate(byteCount: capacity, alignment: 4096)
    }

    deinit { base.deallocate() }

    /// How many bytes are queued.
    public var count: Int { tail - head }
    /// Whether nothing is queued.
    public var isEmpty: Bool { head == tail }
    /// How many more bytes fit.
    public var free: Int { capacity - count }

    /// The queued bytes.
    public var bytes: UnsafeRawBufferPointer { UnsafeRawBufferPointer(start: base + head, count: tail - head) }

    /// Memory for at least `wanted` more bytes if they fit; commit with `append(count:)`.
    public mutating func space(_ wanted: Int) -> UnsafeMutableRawBufferPointer {
        if capacity - tail < wanted, head > 0 {
            memmove(base, base + head, tail - head)
            tail -= head
            head = 0
        }
        return UnsafeMutableRawBufferPointer(start: base + tail, count: capacity - tail)
    }

    /// Counts bytes that were written into `space`.
    public mutating func append(count: Int) { tail += count }

    /// Appends a copy of the bytes; grows when they do not fit.
    public mutating func append(_ bytes: UnsafeRawBufferPointer) {
        if free < bytes.count { grow(to: max(capacity * 2, count + bytes.count)) }
        let target = space(bytes.count)
        if let source = bytes.baseAddress { memcpy(target.baseAddress!, source, bytes.count) }
        tail += bytes.count
    }

    /// Drops bytes from the front.
    public mutating func remove(_ count: Int) {
        head += count
        if head == tail {
            head = 0
            tail = 0
        }
    }

    /// Drops everything.
    public mutating func removeAll() {
        head = 0
        tail = 0
    }

    private mutating func grow(to size: Int) {
        let larger = UnsafeMutableRawPointer.allocate(byteCount: size, alignment: 4096)
        memcpy(larger, base + head, tail - head)
        base.deallocate()
        base = larger
        capacity = size
        tail -= head
        head = 0
    }
}
