/// Buffers of a few sizes that are used again, so that the data path allocates nothing in its steady state.
///
/// Freshly allocated memory costs a page fault for each page; a reused buffer is warm. Confined to no thread: a lock
/// guards the lists, taken once for each buffer.
public final class BufferPool: Sendable {
    /// Sizes of payloads with a page to spare, where a reply's header goes in front of page-aligned data.
    private static let classes = [4, 64, 256, 1024, 2048].map { ($0 + 4) << 10 }
    private struct Lists: @unchecked Sendable {
        // Unchecked: the pointers are owned by the list that holds them.
        var free: [[UnsafeMutableRawPointer]] = Array(repeating: [], count: BufferPool.classes.count)
    }
    private let lists = Guarded(Lists())
    private let keep: Int

    /// Makes a pool.
    ///
    /// - Parameter keep: how many unused bytes of each size are kept at most.
    public init(keep: Int = 32 << 20) { self.keep = keep }

    deinit {
        lists.withLock { lists in
            for list in lists.free { for pointer in list { pointer.deallocate() } }
        }
    }

    /// A buffer of at least `count` bytes, with undefined contents.
    public func buffer(_ count: Int) -> IOBuffer {
        guard let index = Self.classes.firstIndex(where: { $0 >= count }) else { return IOBuffer(capacity: count) }
        let size = Self.classes[index]
        // The pointer leaves the lock alone: its memory belongs to the caller from here on.
        nonisolated(unsafe) let reused = lists.withLock { Box($0.free[index].popLast()) }.value
        return IOBuffer(base: reused ?? .allocate(byteCount: size, alignment: 4096), capacity: size, pool: self)
    }

    func giveBack(_ base: UnsafeMutableRawPointer, _ capacity: Int) {
        let box = Box(base)
        let keepIt = lists.withLock { lists in
            guard let index = Self.classes.firstIndex(of: capacity),
                lists.free[index].count < max(keep / capacity, 4)
            else { return false }
            lists.free[index].append(box.value!)
            return true
        }
        if !keepIt { base.deallocate() }
    }

    private struct Box: @unchecked Sendable {
        // Unchecked: carries a pointer across a closure that runs at once on the same thread.
        let value: UnsafeMutableRawPointer?
        init(_ value: UnsafeMutableRawPointer?) { self.value = value }
    }
}
