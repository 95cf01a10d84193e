internal import Synchronization

/// Which chunks of a disk were changed since they were read: a bit each, of two ages.
///
/// Whoever changes a chunk marks it afterwards; whoever reads one takes its mark first. So a chunk that is changed while it
/// is read stays marked. No lock: a writer must never wait for a reader that was not given the processor.
final class ChunkMarks: Sendable {
    private let fresh: Bits
    /// What was marked when a look for the settled came by.
    private let aged: Bits
    /// How many words of 64 marks there are.
    var words: Int { fresh.count }

    init(chunks: Int, areMarked: Bool) {
        fresh = Bits(count: (chunks + 63) / 64, value: areMarked ? UInt64.max : 0)
        aged = Bits(count: (chunks + 63) / 64, value: 0)
    }

    func mark(_ word: Int, _ bits: UInt64) { fresh[word].bitwiseOr(bits, ordering: .acquiringAndReleasing) }

    /// Takes all marks of a word.
    func take(_ word: Int) -> UInt64 {
        fresh[word].exchange(0, ordering: .acquiringAndReleasing) | aged[word].exchange(0, ordering: .relaxed)
    }

    /// Takes the marks of those that were not marked again since the last call for this word.
    func takeSettled(_ word: Int) -> UInt64 {
        let now = fresh[word].exchange(0, ordering: .acquiringAndReleasing)
        return aged[word].exchange(now, ordering: .relaxed) & ~now
    }

    /// How many are marked.
    var count: Int {
        var count = 0
        for word in 0..<words {
            count += (fresh[word].load(ordering: .relaxed) | aged[word].load(ordering: .relaxed)).nonzeroBitCount
        }
        return count
    }

    var isEmpty: Bool {
        for word in 0..<words
        where fresh[word].load(ordering: .acquiring) | aged[word].load(ordering: .relaxed) != 0 { return false }
        return true
    }
}

/// A fixed number of atomic words.
private final class Bits: @unchecked Sendable {
    // Unchecked: nothing changes but the atomics.
    let count: Int
    private let words: UnsafeMutablePointer<Atomic<UInt64>>

    init(count: Int, value: UInt64) {
        self.count = count
        words = .allocate(capacity: max(count, 1))
        for index in 0..<count { (words + index).initialize(to: Atomic(value)) }
    }

    deinit {
        words.deinitialize(count: count)
        words.deallocate()
    }

    subscript(index: Int) -> Atomic<UInt64> {
        _read {
            precondition(index < count)
            yield words[index]
        }
    }
}
