import Testing

@testable import Web

/// The values below a console: the ring, and the frames of the stream to readers.
struct ConsoleRingTests {
    private func bytes(_ range: Range<Int>) -> [UInt8] { range.map { UInt8(truncatingIfNeeded: $0 &* 7 &+ $0 >> 8) } }

    @Test func offsetsGoOnAndTheOldestBytesGo() {
        var ring = ConsoleRing(capacity: 10)
        #expect(ring.oldest == 0 && ring.next == 0 && ring.read(from: 0, most: 5).bytes.isEmpty)
        ring.append(bytes(0..<7))
        #expect(ring.oldest == 0 && ring.read(from: 2, most: 100) == (2, bytes(2..<7)))
        ring.append(bytes(7..<13))
        #expect(ring.oldest == 3 && ring.next == 13)
        #expect(ring.read(from: 0, most: 100) == (3, bytes(3..<13)))
        #expect(ring.read(from: 9, most: 3) == (9, bytes(9..<12)))
        #expect(ring.read(from: 99, most: 3) == (13, []) && ring.read(from: .max, most: 1).offset == 13)
        #expect(ring.tail(4) == (9, bytes(9..<13)) && ring.tail(100) == (3, bytes(3..<13)))
        ring.append(bytes(13..<50))
        #expect(ring.read(from: 0, most: 100) == (40, bytes(40..<50)))
    }

    @Test func whateverIsAppendedIsReadAsOneStream() {
        var generator = SystemRandomNumberGenerator()
        var (ring, all) = (ConsoleRing(capacity: 1000), [UInt8]())
        var seen: [UInt8] = []
        for _ in 0..<500 {
            let piece = bytes(all.count..<(all.count + Int.random(in: 0...700, using: &generator)))
            all += piece
            ring.append(piece)
            while true {
                let read = ring.read(from: UInt64(seen.count), most: Int.random(in: 1...400, using: &generator))
                #expect(read.offset == UInt64(seen.count))
                if read.bytes.isEmpty { break }
                seen += read.bytes
            }
        }
        #expect(seen == all)
        #expect(ring.tail(1000).bytes == Array(all.suffix(1000)))
    }

    @Test func theStreamOfAnotherHostGoesOn() {
        var ring = ConsoleRing(capacity: 10)
        ring.append(bytes(0..<6))
        // What is there is not taken twice.
        let overlaps = ring.extend(with: bytes(4..<9), at: 4)
        #expect(overlaps && ring.next == 9 && ring.read(from: 0, most: 100) == (0, bytes(0..<9)))
        let isNothing = ring.extend(with: bytes(5..<9), at: 5)
        #expect(isNothing && ring.next == 9)
        let isBack = ring.extend(with: bytes(0..<5), at: 0)
        #expect(!isBack && ring.next == 9)
        // What is missing is not made up for.
        let jumps = ring.extend(with: [1, 2], at: 100)
        #expect(jumps && ring.next == 102 && ring.read(from: 0, most: 100) == (100, [1, 2]))
        let before = ring
        for offset in [UInt64(101), .max, ConsoleRing.mostOffset + 1] {
            let skips = ring.skip(to: offset)
            #expect(!skips && ring == before)
        }
        let isTaken = ring.extend(with: [1], at: .max)
        #expect(!isTaken && ring == before)
        let stays = ring.skip(to: 102)
        #expect(stays && ring == before)
    }

    @Test func theOffsetsOfAnotherHostGoOn() {
        var ring = ConsoleRing(capacity: 10)
        ring.append(bytes(0..<3))
        let tail: [UInt8] = [9, 8, 7, 6]
        let outcome = ring.follow(tail, at: 1_000_000)
        #expect(outcome && ring.next == 1_000_007)
        #expect(ring.read(from: 0, most: 100) == (1_000_000, tail + bytes(0..<3)))
        // More was written here than is kept: nothing is said to be whole that is not.
        var full = ConsoleRing(capacity: 4)
        full.append(bytes(0..<9))
        let isFollowed = full.follow([1, 2], at: 50)
        #expect(isFollowed && full.next == 61 && full.read(from: 0, most: 100) == (57, bytes(5..<9)))
        for (tail, offset) in [([UInt8](), UInt64.max), (bytes(0..<11), 0)] {
            let before = ring
            let isTaken = ring.follow(tail, at: offset)
            #expect(!isTaken && ring == before)
        }
    }

    @Test func framesAreReadHoweverTheyAreCut() throws {
        let frames: [ConsoleFrame] = [
            .note(Array("{}".utf8)), .output(offset: 1 << 40, bytes(0..<300)), .input([]), .input([13]),
            .output(offset: 0, bytes(0..<ConsoleFrame.mostBytes)),
        ]
        let stream = frames.flatMap(\.encoded)
        for size in [1, 3, 1000, stream.count] {
            var parser = ConsoleFrame.Parser()
            var found: [ConsoleFrame] = []
            for start in stride(from: 0, to: stream.count, by: size) {
                parser.append(stream[start..<min(start + size, stream.count)])
                while let frame = try parser.next() { found.append(frame) }
                // One byte at a time is enough of the short ones.
                if size == 1, found.count == 4 { break }
            }
            #expect(found == (size == 1 ? Array(frames.prefix(4)) : frames))
        }
    }

    @Test(
        arguments: [[3, 0, 0, 0], [255, 255, 255, 255], [0, 0, 16, 1], [2, 1, 0, 1], [1, 0, 0, 7], [1, 1, 0, 9]]
            as [[UInt8]]
    )
    func whatIsNoFrameIsRefusedAtItsHead(_ head: [UInt8]) {
        var parser = ConsoleFrame.Parser()
        parser.append(head)
        #expect(throws: ConsoleFrame.Parser.Violation.self) { try parser.next() }
    }
}
