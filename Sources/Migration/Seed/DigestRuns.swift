internal import Glibc

/// Digests of consecutive chunks as they are sent: runs of equal ones, and runs of others.
///
/// A run is a number of four bytes, big-endian, whose highest bit says that the one digest after it counts for all chunks of the run, and
/// whose other bits say how many chunks they are; without that bit a digest follows for each. Digests are random, so that nothing else
/// about them can be made shorter.
enum DigestRuns {
    /// How many bytes of a chunk's SHA-256 are sent, the first ones; all zeroes for a chunk of zeroes.
    static let digestLength = 16
    private static let repeated: UInt32 = 1 << 31

    /// One run, and where its digests are in the bytes that were decoded.
    struct Run: Equatable, Sendable {
        var count: Int
        var isRepeated: Bool
        var offset: Int
    }

    /// Encodes digests of 16 bytes each.
    static func encode(_ digests: UnsafeRawBufferPointer) -> [UInt8] {
        let count = digests.count / digestLength
        var encoded: [UInt8] = []
        func isSame(_ first: Int, _ second: Int) -> Bool {
            guard let base = digests.baseAddress else { return false }
            return memcmp(base + first * digestLength, base + second * digestLength, digestLength) == 0
        }
        func put(_ run: Range<Int>, isRepeated: Bool) {
            if run.isEmpty { return }
            let head = UInt32(run.count) | (isRepeated ? repeated : 0)
            encoded += [24, 16, 8, 0].map { UInt8(truncatingIfNeeded: head >> $0) }
            let end = isRepeated ? run.lowerBound + 1 : run.upperBound
            encoded += digests[(run.lowerBound * digestLength)..<(end * digestLength)]
        }
        var (begin, position) = (0, 0)
        while position < count {
            var end = position + 1
            while end < count, isSame(position, end) { end += 1 }
            if end - position > 1 {
                put(begin..<position, isRepeated: false)
                put(position..<end, isRepeated: true)
                begin = end
            }
            position = end
        }
        put(begin..<count, isRepeated: false)
        return encoded
    }

    /// Reads the runs of some bytes, of at most so many chunks together.
    ///
    /// - Returns: the runs; nil when the bytes are no such runs, or speak of more chunks.
    static func decode(_ bytes: [UInt8], most: Int) -> [Run]? {
        var runs: [Run] = []
        var (position, chunks) = (0, 0)
        while position < bytes.count {
            guard position + 4 <= bytes.count else { return nil }
            let head = bytes[position..<(position + 4)].reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
            let isRepeated = head & repeated != 0
            let count = Int(head & ~repeated)
            let offset = position + 4
            guard count > 0, count <= most - chunks else { return nil }
            let length = isRepeated ? digestLength : count * digestLength
            guard length <= bytes.count - offset else { return nil }
            runs.append(Run(count: count, isRepeated: isRepeated, offset: offset))
            chunks += count
            position = offset + length
        }
        return runs
    }
}
