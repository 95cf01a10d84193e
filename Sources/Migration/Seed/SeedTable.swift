internal import Glibc
internal import IO

/// What the destination has of a disk, as far as it has told and it is still kept: a window of a table that may be larger than memory.
///
/// It comes in the order of the chunks, and a mirror copies in that order: what lies behind the copy is given up when room is needed.
public struct SeedTable: Sendable {
    private struct Frame: Sendable {
        var bytes: [UInt8]
        var runs: [DigestRuns.Run]
        /// The first chunk of each run.
        var starts: [Int]
        var end: Int
        /// What it takes of memory.
        var size: Int { bytes.count + 48 * runs.count + 96 }
    }

    /// How many bytes are kept at most, but for one frame: the digests of 16 GiB.
    static let most = 4 << 20

    /// How many chunks the disk has.
    public let chunks: Int
    private var frames: [Frame] = []
    /// The chunks before this one were told.
    public private(set) var end = 0
    private var size = 0

    /// Makes a table of which nothing is known.
    public init(chunks: Int) { self.chunks = chunks }

    /// Whether more may come before something is given up.
    public var hasRoom: Bool { size < Self.most }
    /// Whether every chunk was told.
    public var isComplete: Bool { end == chunks }

    /// Takes the digests of the next chunks.
    ///
    /// - Throws: `ChannelError` when they are not what they should be.
    public mutating func append(_ bytes: [UInt8]) throws {
        guard let runs = DigestRuns.decode(bytes, most: chunks - end), !runs.isEmpty else {
            throw ChannelError(
                .protocolViolation,
                "The table of what the destination has is malformed: it is longer than the disk, or no table"
            )
        }
        var frame = Frame(bytes: bytes, runs: runs, starts: [], end: end)
        for run in runs {
            frame.starts.append(frame.end)
            frame.end += run.count
        }
        end = frame.end
        size += frame.size
        frames.append(frame)
    }

    /// Gives up what is before a chunk, if room is needed.
    public mutating func release(before chunk: Int) {
        var count = 0
        while !hasRoom, count < frames.count, frames[count].end <= chunk {
            size -= frames[count].size
            count += 1
        }
        frames.removeFirst(count)
    }

    /// Calls a closure with the digest of a chunk.
    ///
    /// - Returns: nil when it is not known.
    public func withDigest<Result>(of chunk: Int, _ body: (UnsafeRawBufferPointer) -> Result) -> Result? {
        let index = Self.first(frames.count) { frames[$0].end > chunk }
        guard index < frames.count, let start = frames[index].starts.first, start <= chunk else { return nil }
        let frame = frames[index]
        let number = Self.first(frame.starts.count) { frame.starts[$0] > chunk } - 1
        let run = frame.runs[number]
        let place = run.isRepeated ? 0 : chunk - frame.starts[number]
        let offset = run.offset + place * DigestRuns.digestLength
        return frame.bytes.withUnsafeBytes {
            body(UnsafeRawBufferPointer(rebasing: $0[offset..<(offset + DigestRuns.digestLength)]))
        }
    }

    /// The first number below `count` of which something is true that stays true from then on; `count` when there is none.
    private static func first(_ count: Int, where isTrue: (Int) -> Bool) -> Int {
        var (low, high) = (0, count)
        while low < high {
            let middle = (low + high) / 2
            if isTrue(middle) { high = middle } else { low = middle + 1 }
        }
        return low
    }
}
