import IO
import Testing

@testable import TLS

/// SHA-256 of several messages at a time, next to libgcrypt's of each.
struct SHA256BatchTests {
    /// Bytes that are not the same in any two messages.
    private func bytes(_ count: Int) -> [UInt8] {
        var state = UInt64(count) &* 0x9e37_79b9_7f4a_7c15 | 1
        return (0..<count).map { _ in
            state ^= state << 13
            state ^= state >> 7
            state ^= state << 17
            return UInt8(truncatingIfNeeded: state)
        }
    }

    private func batch(_ bytes: [UInt8], each length: Int) -> [[UInt8]] {
        let count = (bytes.count + length - 1) / length
        var digests = [UInt8](repeating: 0, count: count * 32)
        bytes.withUnsafeBytes { source in
            digests.withUnsafeMutableBytes { target in
                if let base = target.baseAddress { SHA256Batch.hash(source, each: length, into: base) }
            }
        }
        return (0..<count).map { Array(digests[($0 * 32)..<($0 * 32 + 32)]) }
    }

    private func single(_ bytes: [UInt8], each length: Int) -> [[UInt8]] {
        stride(from: 0, to: bytes.count, by: length).map {
            HashAlgorithm.sha256.hash(bytes[$0..<min($0 + length, bytes.count)])
        }
    }

    @Test(arguments: [1, 63, 64, 65, 128, 4096, 65536])
    func areThoseOfEachMessage(length: Int) {
        for count in [1, 2, 3, 7, 8, 9, 15, 16, 17, 33] {
            let bytes = bytes(count * length)
            #expect(batch(bytes, each: length) == single(bytes, each: length), "\(count) of \(length)")
        }
    }

    @Test func theLastMessageMayBeShorter() {
        for rest in [1, 512, 4095] {
            let bytes = bytes(20 * 4096 + rest)
            #expect(batch(bytes, each: 4096) == single(bytes, each: 4096))
        }
        #expect(batch([], each: 64).isEmpty)
    }

    /// Also the ways that are not the fastest here.
    @Test(arguments: 0..<SHA256Batch.countOfWays)
    func eachWayOfThisProcessorAgrees(way: Int32) {
        for (length, count) in [(64, 16), (64, 5), (128, 31), (4096, 16), (65536, 17)] {
            let bytes = bytes(count * length)
            guard let digests = SHA256Batch.hash(bytes, each: length, way: way) else { continue }
            #expect(digests == single(bytes, each: length), "\(count) of \(length)")
        }
        // FIPS 180-4: a million times "a" has no padding of its own here, since 64 divides it.
        let known = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
        let million = [UInt8](repeating: UInt8(ascii: "a"), count: 1_000_000)
        if let digests = SHA256Batch.hash(million, each: 1_000_000, way: way) { #expect(digests.map(\.hex) == [known]) }
    }
}
