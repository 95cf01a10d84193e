import IO
import Synchronization
import TestSupport
import Testing

@testable import NBD

/// The plan and the engine of copies.
@Suite(.timeLimit(.minutes(1)))
struct CopyTests {
    /// A disk whose extents are given, and which can fail.
    final class Scripted: BackEnd {
        let size: UInt64
        let isReadOnly = false
        let traits: BackEndTraits
        private let pieces: [Extent]
        let failsAt: UInt64
        let reads = Atomic<Int>(0)

        init(_ pieces: [Extent], minimum: UInt32 = 1, failsAt: UInt64 = .max) {
            self.pieces = pieces
            size = pieces.reduce(0) { $0 + $1.length }
            var traits = BackEndTraits()
            traits.blockSizes.minimum = minimum
            self.traits = traits
            self.failsAt = failsAt
        }

        private func check(_ offset: UInt64, _ count: UInt64) {
            let block = UInt64(traits.blockSizes.minimum)
            #expect(offset % block == 0 && (count % block == 0 || offset + count == size), "\(offset) \(count)")
        }
        func tryRead(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws -> Bool {
            reads.wrappingAdd(1, ordering: .relaxed)
            if offset >= failsAt { throw NBDError(.io, "a bad sector") }
            buffer.initializeMemory(as: UInt8.self, repeating: 1)
            return true
        }
        func read(into payload: Payload, at offset: UInt64) async throws {}
        func tryWrite(_ payload: Payload, at offset: UInt64, fua: Bool) throws -> Bool {
            check(offset, UInt64(payload.count))
            return true
        }
        func write(_ payload: Payload, at offset: UInt64, fua: Bool) async throws {}
        func zero(at offset: UInt64, count: UInt64, _ options: ZeroOptions) async throws { check(offset, count) }
        func trim(at offset: UInt64, count: UInt64, fua: Bool) async throws {}
        func flush() async throws {}
        func extents(at offset: UInt64, count: UInt64, limit: Int) async throws -> [Extent] {
            var result: [Extent] = []
            var position: UInt64 = 0
            for piece in pieces where result.count < limit {
                let (start, end) = (max(position, offset), min(position + piece.length, offset + count))
                if start < end { result.append(Extent(length: end - start, flags: piece.flags)) }
                position += piece.length
            }
            return result
        }
    }

    private static let hole: UInt64 = 3

    @Test func piecesCoverTheDiskInOrderAndZeroesOnlyShrinkToTheGranule() async throws {
        let disk = Scripted([
            Extent(length: 1000, flags: Self.hole), Extent(length: 3096, flags: 0),
            Extent(length: 10_000, flags: Self.hole),
            Extent(length: 100, flags: 0), Extent(length: 500_000, flags: Self.hole), Extent(length: 9_001, flags: 0),
        ])
        let plan = CopyPlan(source: disk, size: disk.size, from: 0, pieceSize: 8192, granule: 4096, usesExtents: true)
        var position: UInt64 = 0
        var zeroes: UInt64 = 0
        while let piece = try await plan.next() {
            #expect(piece.offset == position && piece.offset % 4096 == 0)
            position += piece.count
            if piece.isZero {
                zeroes += piece.count
                // Every byte of it is in a hole of the source.
                let found = try await disk.extents(at: piece.offset, count: piece.count, limit: 100)
                #expect(!found.contains { !$0.isZero }, "\(piece)")
            } else {
                #expect(piece.count <= 8192)
            }
            plan.finish(piece)
        }
        #expect(position == disk.size && plan.lowWater == disk.size && zeroes > 490_000)
    }

    @Test func theLowWaterMarkWaitsForTheLastGapAndARewindForgetsWhatCameBefore() async throws {
        let disk = Scripted([Extent(length: 40_960, flags: 0)])
        let plan = CopyPlan(source: disk, size: disk.size, from: 0, pieceSize: 4096, granule: 1, usesExtents: true)
        var pieces: [CopyPlan.Piece] = []
        for _ in 0..<5 { pieces.append(try #require(try await plan.next())) }
        for piece in pieces[1...] { plan.finish(piece) }
        #expect(plan.lowWater == 0)
        plan.finish(pieces[0])
        #expect(plan.lowWater == 5 * 4096)
        let late = try #require(try await plan.next())
        plan.rewind(to: 8192)
        plan.finish(late)
        #expect(plan.lowWater == 8192)
        let again = try await plan.next()
        #expect(again?.offset == 8192)
        plan.fail()
        let none = try await plan.next()
        #expect(none == nil)
    }

    @Test func requestsFitTheTargetsBlocks() async throws {
        let source = Scripted([
            Extent(length: 700, flags: 0), Extent(length: 70_000, flags: Self.hole), Extent(length: 30_000, flags: 0),
        ])
        let target = Scripted([Extent(length: source.size, flags: 0)], minimum: 4096)
        let loops = EventLoopGroup(count: 1, name: "copy")
        defer { loops.stop() }
        var options = DiskCopy.Options()
        options.sparse = 512
        let copy = try DiskCopy(from: source, to: target, options)
        try await copy.run(on: loops.loops)
        #expect(copy.position == source.size && copy.summary.zeroes >= 60_000)
        let larger = Scripted([Extent(length: 1 << 20, flags: 0)], minimum: 4096)
        #expect((try? DiskCopy(from: source, to: larger, options)) == nil)
    }

    @Test func theFirstErrorEndsTheCopySoon() async throws {
        let source = Scripted([Extent(length: 1 << 30, flags: 0)], failsAt: 8 << 20)
        let loops = EventLoopGroup(count: 2, name: "copy")
        defer { loops.stop() }
        let copy = try DiskCopy(from: source, to: NullDisk(size: 1 << 30), DiskCopy.Options())
        await #expect(throws: NBDError.self) { try await copy.run(on: loops.loops) }
        #expect(source.reads.load(ordering: .relaxed) < 100)
    }

    @Test func aDifferenceIsFoundAtItsByte() async throws {
        let (a, b) = (try RawFile(memory: 4 << 20), try RawFile(memory: 4 << 20))
        let loops = EventLoopGroup(count: 2, name: "copy")
        defer { loops.stop() }
        let data = Payload(IOBuffer(copying: (0..<(1 << 20)).map { UInt8(truncatingIfNeeded: $0 &* 7) }), 0..<(1 << 20))
        try await a.write(data, at: 1 << 20, fua: false)
        let copy = try DiskCopy(from: a, to: b, DiskCopy.Options())
        try await copy.run(on: loops.loops)
        let same = try await copy.verify(on: loops.loops)
        #expect(same == nil)
        let one = Payload(IOBuffer(copying: [255]), 0..<1)
        try await b.write(one, at: 3_000_001, fua: false)
        let later = try await copy.verify(on: loops.loops) ?? 0
        #expect(later == 3_000_001)
        try await b.write(one, at: (1 << 20) + 5, fua: false)
        let earlier = try await copy.verify(on: loops.loops) ?? 0
        #expect(earlier == 1_048_581)
    }

    @Test func ofATargetThatHasMuchOnlyWhatDiffersIsWritten() async throws {
        let (a, b) = (try RawFile(memory: 4 << 20), try RawFile(memory: 4 << 20))
        let loops = EventLoopGroup(count: 2, name: "copy")
        defer { loops.stop() }
        func write(_ disk: RawFile, _ value: UInt8, at offset: Int, count: Int) async throws {
            let data = Payload(IOBuffer(copying: [UInt8](repeating: value, count: count)), 0..<count)
            try await disk.write(data, at: UInt64(offset), fua: false)
        }
        for disk in [a, b] { try await write(disk, 5, at: 1 << 20, count: 1 << 20) }
        // A block of data, a byte of one, and data at the target where the source has a hole.
        try await write(a, 6, at: 1 << 20, count: 65536)
        try await write(b, 7, at: (1 << 20) + 200_000, count: 1)
        try await write(b, 8, at: 3 << 20, count: 65536)
        var options = DiskCopy.Options()
        options.comparesTarget = true
        let copy = try DiskCopy(from: a, to: b, options)
        try await copy.run(on: loops.loops)
        let difference = try await copy.verify(on: loops.loops)
        #expect(difference == nil)
        #expect(copy.summary.written == 2 * 65536 && copy.summary.present >= (4 << 20) - 4 * 65536)
    }

    @Test func aRateIsKept() {
        let limit = RateLimit(bytesPerSecond: 1 << 20)
        let delays = (0..<10).map { _ in limit.take(1 << 20) }
        // The tenth of ten seconds' worth begins after nine, but for the time that the calls took and a small burst.
        #expect(delays[9] <= .seconds(9) && delays == delays.sorted())
    }
}
