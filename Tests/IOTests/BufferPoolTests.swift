import IO
import Testing

/// Buffers that are used again.
struct BufferPoolTests {
    private static let size = 1 << 20

    /// The addresses of so many buffers that are all in use at once.
    private func addresses(_ pool: BufferPool, _ count: Int) -> [UInt] {
        let buffers = (0..<count).map { _ in pool.buffer(Self.size) }
        return buffers.map { UInt(bitPattern: $0.bytes(0..<1).baseAddress!) }
    }

    @Test func whatWasGivenBackIsUsedAgain() {
        let pool = BufferPool(keep: 8 << 20)
        let first = Set(addresses(pool, 4))
        #expect(first.count == 4)
        #expect(Set(addresses(pool, 4)) == first)
    }

    @Test func moreIsKeptWhileOthersAreInUse() {
        let pool = BufferPool(keep: 4 << 20, atWork: 64 << 20)
        let held = pool.buffer(Self.size)
        let first = Set(addresses(pool, 32))
        #expect(Set(addresses(pool, 32)) == first)
        withExtendedLifetime(held) {}
    }

    @Test func theRestGoesWithTheLastOne() {
        let pool = BufferPool(keep: 4 << 20, atWork: 64 << 20)
        _ = addresses(pool, 32)
        #expect(pool.unused == 4)
    }
}
