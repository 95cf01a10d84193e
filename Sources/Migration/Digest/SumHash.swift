internal import CXXHash

/// A checksum of checksums, run by run.
struct SumHash {
    private var sum: UInt64 = 0

    mutating func add(_ run: UnsafeBufferPointer<UInt64>) {
        if run.isEmpty { return }
        sum = XXH3_64bits_withSeed(run.baseAddress, run.count * 8, sum)
    }

    var text: String { String(sum, radix: 16) }
}
