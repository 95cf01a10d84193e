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
        /// How many are in use of each size.
        var used = Array(repeating: 0, count: BufferPool.classes.count)
    }
    private let lists = Guarded(Lists())
    private let keep: Int
    private let keepAtWork: Int

    /// Makes a pool.
    ///
    /// - Parameters:
    ///   - keep: how many unused bytes of each size are kept at most.
    ///   - atWork: the same as long as others of that size are in use, for users that give many back at once and want them again soon;
    ///     `keep` when nil.
    public init(keep: Int = 32 << 20, atWork: Int? = nil) {
        self.keep = keep
        keepAtWork = max(atWork ?? keep, keep)
    }

    deinit {
        lists.withLock { lists in
            for list in lists.free { for pointer in list { pointer.deallocate() } }
        }
    }

    /// How many unused buffers are kept, of all sizes.
    public var unused: Int { lists.withLock { lists in lists.free.reduce(0) { $0 + $1.count } } }

    /// A buffer of at least `count` bytes, with undefined contents.
    public func buffer(_ count: Int) -> IOBuffer {
        guard let index = Self.classes.firstIndex(where: { $0 >= count }) else { return IOBuffer(capacity: count) }
        let size = Self.classes[index]
        // The pointer leaves the lock alone: its memory belongs to the caller from here on.
        nonisolated(unsafe) let reused = lists.withLock { lists in
            lists.used[index] += 1
            return Box(lists.free[index].popLast())
        }.value
        return IOBuffer(base: reused ?? .allocate(byteCount: size, alignment: 4096), capacity: size, pool: self)
    }

    func giveBack(_ base: UnsafeMutableRawPointer, _ capacity: Int) {
        let box = Box(base)
        let (isKept, hasSurplus) = lists.withLock { lists in
            guard let index = Self.classes.firstIndex(of: capacity) else { return (false, false) }
            lists.used[index] -= 1
            let most = max((lists.used[index] > 0 ? keepAtWork : keep) / capacity, 4)
            guard lists.free[index].count < most else { return (false, lists.free[index].count > most) }
            lists.free[index].append(box.value!)
            return (true, false)
        }
        if !isKept { base.deallocate() }
        if hasSurplus { trim(capacity) }
    }

    /// Releases what is kept at work only.
    private func trim(_ capacity: Int) {
        while true {
            nonisolated(unsafe) let surplus = lists.withLock { lists in
                guard let index = Self.classes.firstIndex(of: capacity), lists.used[index] == 0,
                    lists.free[index].count > max(keep / capacity, 4)
                else { return Box(nil) }
                return Box(lists.free[index].popLast())
            }.value
            guard let surplus else { return }
            surplus.deallocate()
        }
    }

    private struct Box: @unchecked Sendable {
        // Unchecked: carries a pointer across a closure that runs at once on the same thread.
        let value: UnsafeMutableRawPointer?
        init(_ value: UnsafeMutableRawPointer?) { self.value = value }
    }
}
