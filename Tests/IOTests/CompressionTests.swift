import IO
import Testing

/// Which pieces are compressed.
struct CompressionTests {
    /// Sends pieces of 256 KiB over a line of a rate, with a compressor of a speed that leaves a part of them. Returns how many went compressed.
    private func run(_ wanted: Compression, pieces: Int = 1000, line: Double, speed: Double, part: Double) -> Int {
        var choice = CompressionChoice(wanted)
        let size = 256 << 10
        var compressed = 0
        for _ in 0..<pieces {
            var bytes = size
            if choice.next() {
                let result = Int(Double(size) * min(part, 1))
                if choice.compressed(size, to: result, in: .seconds(Double(size) / speed)) {
                    bytes = result
                    compressed += 1
                }
            }
            choice.sent(bytes, in: .seconds(Double(bytes) / line))
        }
        return compressed
    }

    @Test func aSlowLineIsHelpedAndAFastOneIsLeftAlone() {
        #expect(run(.auto, line: 12e6, speed: 400e6, part: 0.4) > 990)
        #expect(run(.auto, line: 120e6, speed: 400e6, part: 0.4) > 990)
        // Sending takes less time than compressing would.
        #expect(run(.auto, line: 1000e6, speed: 400e6, part: 0.4) == 0)
        // A busy core: it was tried, and given up.
        #expect(run(.auto, line: 120e6, speed: 60e6, part: 0.4) < 20)
    }

    @Test func aLineThatWasMeasuredToBeSlowIsHelpedFromTheFirstPieceOn() {
        var (slow, fast, unknown) = (
            CompressionChoice(.auto, line: 12e6), CompressionChoice(.auto, line: 120e6), CompressionChoice(.auto)
        )
        #expect([slow.next(), fast.next(), unknown.next()] == [true, false, false])
    }

    @Test func whatDoesNotShrinkIsTriedNowAndThen() {
        #expect(run(.auto, line: 12e6, speed: 400e6, part: 1) == 0)
        var choice = CompressionChoice(.level(3))
        var tries = 0
        for _ in 0..<10_000 where choice.next() {
            tries += 1
            let isUsed = choice.compressed(1000, to: 990, in: .microseconds(3))
            #expect(!isUsed)
        }
        #expect((30...60).contains(tries), "\(tries)")
    }

    @Test func whatWasAskedForIsDone() {
        #expect(run(.off, line: 1e6, speed: 400e6, part: 0.1) == 0)
        #expect(run(.level(19), line: 1000e6, speed: 5e6, part: 0.4) == 1000)
        #expect(CompressionChoice(.off).level == nil && CompressionChoice(.level(7)).level == 7)
    }

    @Test(arguments: [0, 1, 100, 65536])
    func whatWasCompressedComesBack(_ count: Int) throws {
        let bytes = (0..<count).map { UInt8(truncatingIfNeeded: $0 >> 3) }
        let compressor = try #require(ZstdCompressor(level: 1))
        let decompressor = try #require(ZstdDecompressor())
        var packed = [UInt8](repeating: 0, count: count + 64)
        let made = bytes.withUnsafeBytes { source in
            packed.withUnsafeMutableBytes { compressor.compress(source, into: $0) }
        }
        let size = try #require(made)
        var result = [UInt8](repeating: 0xff, count: count)
        try packed.withUnsafeBytes { source in
            try result.withUnsafeMutableBytes {
                try decompressor.decompress(UnsafeRawBufferPointer(rebasing: source.prefix(size)), into: $0)
            }
        }
        #expect(result == bytes)
        // It does not fit: nothing is said to have been done.
        var small = [UInt8](repeating: 0, count: 2)
        let none = bytes.withUnsafeBytes { source in
            small.withUnsafeMutableBytes { compressor.compress(source, into: $0) }
        }
        #expect(none == nil)
    }
}
