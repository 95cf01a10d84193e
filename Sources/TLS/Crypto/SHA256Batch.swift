internal import CSHA256

/// SHA-256 (FIPS 180-4) of many messages of one length, several at a time where that is faster.
///
/// libgcrypt takes one message after the other, and a round of it waits for the one before: 1.4 GB/s with a processor's own instructions for it,
/// where sixteen messages in the lanes of its widest registers make 2.8. Which way is fastest depends on the processor and is measured once.
public enum SHA256Batch {
    /// How many messages at once are worth giving.
    public static let most = 16

    /// A way to hash several messages at a time.
    private struct Way: Sendable {
        /// Its number in `CSHA256`.
        let number: Int32
        /// How many messages it takes.
        let width: Int
        /// What it takes for them, in the time of one message with libgcrypt.
        let cost: Double
    }

    /// What this processor can do, measured.
    private static let ways: [Way] = (0..<Int32(XD_SHA256_WAYS)).compactMap { number in
        let width = Int(xd_sha256_width(number))
        guard width > 1, width <= most else { return nil }
        let length = 4096
        return withUnsafeTemporaryAllocation(byteCount: width * length, alignment: 64) { messages in
            withUnsafeTemporaryAllocation(byteCount: width * digestLength, alignment: 64) { digests in
                guard let target = digests.baseAddress else { return nil }
                messages.initializeMemory(as: UInt8.self, repeating: 0)
                let bytes = UnsafeRawBufferPointer(messages)
                let one = UnsafeRawBufferPointer(rebasing: bytes[..<length])
                let single = shortest { HashAlgorithm.sha256.hash(one, into: target) }
                let several = shortest { hash(bytes, each: length, number, width, into: target) }
                return Way(number: number, width: width, cost: several / single)
            }
        }
    }

    private static var digestLength: Int { HashAlgorithm.sha256.digestLength }

    /// The shortest of a few times, since others use the processor too.
    private static func shortest(_ body: () -> Void) -> Double {
        (0..<4).map { _ in ContinuousClock().measure(body) / .nanoseconds(1) }.min() ?? .infinity
    }

    /// Writes the digests of messages that lie one after the other, in the same order, 32 bytes each.
    ///
    /// - Parameters:
    ///   - bytes: the messages.
    ///   - length: the length of each, at least 1; the last one may be shorter.
    ///   - digests: has room for as many.
    public static func hash(_ bytes: UnsafeRawBufferPointer, each length: Int, into digests: UnsafeMutableRawPointer) {
        var rest = bytes
        var target = digests
        while !rest.isEmpty {
            let whole = rest.count / length
            // Lanes that are empty cost as much as the others.
            let way = whole > 1 && length % 64 == 0 ? ways.min { cost($0, whole) < cost($1, whole) } : nil
            var done = 1
            if let way, cost(way, whole) < 1 {
                done = min(way.width, whole)
                let messages = UnsafeRawBufferPointer(rebasing: rest[..<(done * length)])
                hash(messages, each: length, way.number, way.width, into: target)
            } else {
                HashAlgorithm.sha256.hash(UnsafeRawBufferPointer(rebasing: rest.prefix(length)), into: target)
            }
            rest = UnsafeRawBufferPointer(rebasing: rest.dropFirst(done * length))
            target += done * digestLength
        }
    }

    private static func cost(_ way: Way, _ count: Int) -> Double { way.cost / Double(min(count, way.width)) }

    /// One step: at most as many messages as the way takes; what it has too many lanes for is thrown away.
    private static func hash(
        _ bytes: UnsafeRawBufferPointer,
        each length: Int,
        _ way: Int32,
        _ width: Int,
        into digests: UnsafeMutableRawPointer
    ) {
        let count = bytes.count / length
        withUnsafeTemporaryAllocation(of: UnsafeRawPointer?.self, capacity: width) { messages in
            for lane in 0..<width {
                messages.initializeElement(at: lane, to: bytes.baseAddress.map { $0 + min(lane, count - 1) * length })
            }
            withUnsafeTemporaryAllocation(byteCount: width * digestLength, alignment: 64) { all in
                guard let from = all.baseAddress else { return }
                xd_sha256_hash(way, messages.baseAddress, length, from.assumingMemoryBound(to: UInt8.self))
                digests.copyMemory(from: from, byteCount: count * digestLength)
            }
        }
    }

    /// The digests by one of the ways alone, for those who compare them; nil when this processor does not have it.
    static func hash(_ bytes: [UInt8], each length: Int, way: Int32) -> [[UInt8]]? {
        let width = Int(xd_sha256_width(way))
        guard width > 0 else { return nil }
        var digests: [[UInt8]] = []
        for first in stride(from: 0, to: bytes.count, by: width * length) {
            let part = bytes[first..<min(first + width * length, bytes.count)]
            let all = part.withUnsafeBytes { bytes in
                [UInt8](unsafeUninitializedCapacity: bytes.count / length * digestLength) { target, count in
                    guard let base = target.baseAddress else { return }
                    hash(bytes, each: length, way, width, into: base)
                    count = bytes.count / length * digestLength
                }
            }
            digests += stride(from: 0, to: all.count, by: digestLength).map { Array(all[$0..<($0 + digestLength)]) }
        }
        return digests
    }

    /// How many ways there are.
    static var countOfWays: Int32 { Int32(XD_SHA256_WAYS) }
}
