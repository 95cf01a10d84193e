import Testing

@testable import Source

/// When QEMU sends what has changed of a page.
struct DeltaCacheTests {
    @Test(
        arguments: [
            // A guest that changes little, on any line.
            (1e6, 10e6, 1 << 30, nil),
            (0, 10e6, 1 << 30, nil),
            // A line that was not measured, and one that is fast.
            (50e6, 0, 1 << 30, nil),
            (300e6, 1e9, 8 << 30, nil),
            // Eight times what is changed in a second, up to half of the memory and the most.
            (2e6, 5e6, 1 << 30, 16 << 20),
            (5e6, 10e6, 1 << 30, 64 << 20),
            (16_777_216, 25e6, 1 << 30, 128 << 20),
            (12e6, 10e6, 256 << 20, 128 << 20),
            (100e6, 100e6, 4 << 30, 512 << 20),
            // What is changed would take more than a quarter of the memory, or than the most.
            (100e6, 100e6, 512 << 20, nil),
            (500e6, 100e6, 64 << 30, nil),
            (12e6, 10e6, 32 << 20, nil),
            (1e300, 10e6, 1 << 40, nil),
        ] as [(Double, Double, UInt64, UInt64?)]
    )
    func itIsAsLargeAsWhatTheGuestChanges(dirty: Double, line: Double, memory: UInt64, bytes: UInt64?) {
        #expect(DeltaCache(dirtyRate: dirty, lineRate: line, memory: memory)?.bytes == bytes)
    }
}

/// At how many pages QEMU looks to tell how fast a guest changes its memory.
struct DirtyRateTests {
    @Test(
        arguments: [
            // A GiB's share of two thousand pages, within what QEMU takes.
            (0, 4096), (256 << 20, 4096), (1 << 30, 2048), (2 << 30, 1024), (4 << 30, 512), (1 << 40, 512), (.max, 512),
        ] as [(UInt64, Int)]
    )
    func aSmallGuestIsLookedAtMoreClosely(_ memory: UInt64, _ pages: Int) {
        #expect(DirtyRate.samples(memory: memory) == pages)
    }
}
