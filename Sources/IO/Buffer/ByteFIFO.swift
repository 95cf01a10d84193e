internal import Glibc

/// A bounded first-in, first-out queue of bytes in one piece of memory. Confined to whoever owns it.
///
/// A class, so that a C callback may fill the queue in the middle of a call that its owner makes: a queue that were a
/// property of the owner would be in use for the whole call by the rules of exclusive access.
public final class ByteFIFO {
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
    public func space(_ wanted: Int) -> UnsafeMutableRawBufferPointer {
        if capacity - tail < wanted, head > 0 {
            memmove(base, base + head, tail - head)
            tail -= head
            head = 0
        }
        return UnsafeMutableRawBufferPointer(start: base + tail, count: capacity - tail)
    }

    /// Counts bytes that were written into `space`.
    public func append(count: Int) { tail += count }

    /// Appends a copy of the bytes; grows when they do not fit.
    public func append(_ bytes: UnsafeRawBufferPointer) {
        if free < bytes.count { grow(to: max(capacity * 2, count + bytes.count)) }
        let target = space(bytes.count)
        if let source = bytes.baseAddress { memcpy(target.baseAddress!, source, bytes.count) }
        tail += bytes.count
    }

    /// Drops bytes from the front.
    public func remove(_ count: Int) {
        head += count
        if head == tail {
            head = 0
            tail = 0
        }
    }

    /// Drops everything.
    public func removeAll() {
        head = 0
        tail = 0
    }

    private func grow(to size: Int) {
        let larger = UnsafeMutableRawPointer.allocate(byteCount: size, alignment: 4096)
        memcpy(larger, base + head, tail - head)
        base.deallocate()
        base = larger
        capacity = size
        tail -= head
        head = 0
    }
}
