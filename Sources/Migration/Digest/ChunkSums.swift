internal import CLinux
internal import CXXHash
internal import FoundationEssentials
internal import Glibc
internal import IO
internal import NBD

/// What the source has sent of a disk, as one short checksum (XXH3, 64 bits) for each 64 KiB chunk.
///
/// Taken from the data that QEMU hands over, in the order in which it is admitted. A chunk that was written in part only, or
/// discarded, is not known.
public final class ChunkSums: @unchecked Sendable {
    // Unchecked: confined to the relay's loop.
    private let size: UInt64
    private let chunks: Int
    private let sums: UnsafeMutablePointer<UInt64>
    private var known: [UInt64]

    /// Makes checksums for a disk of which nothing has been sent.
    ///
    /// - Throws: `ChannelError` when there is no memory for so many.
    public init(size: UInt64) throws {
        self.size = size
        chunks = Int((size + ChunkDigests.chunkSize - 1) / ChunkDigests.chunkSize)
        guard size <= 1 << 50, let memory = calloc(max(chunks, 1), 8) else {
            throw ChannelError(.system, "A disk of \(size) bytes is too large")
        }
        sums = memory.bindMemory(to: UInt64.self, capacity: max(chunks, 1))
        known = [UInt64](repeating: 0, count: (chunks + 63) / 64)
    }

    deinit { free(sums) }

    /// The checksum of a chunk that is not all zeroes; 0 stands for one that is.
    static func sum(_ bytes: UnsafeRawBufferPointer) -> UInt64 {
        let sum = XXH3_64bits(bytes.baseAddress, bytes.count)
        return sum == 0 ? 1 : sum
    }

    private func setKnown(_ chunk: Int, _ isKnown: Bool) {
        if isKnown {
            known[chunk / 64] |= 1 << UInt64(chunk % 64)
        } else {
            known[chunk / 64] &= ~(1 << UInt64(chunk % 64))
        }
    }

    private func isWhole(_ chunk: Int, _ range: Range<UInt64>) -> Bool {
        let start = UInt64(chunk) * ChunkDigests.chunkSize
        return range.lowerBound <= start && min(start + ChunkDigests.chunkSize, size) <= range.upperBound
    }

    private func chunks(of range: Range<UInt64>) -> Range<Int> {
        let last = Int((range.upperBound + ChunkDigests.chunkSize - 1) / ChunkDigests.chunkSize)
        return Int(range.lowerBound / ChunkDigests.chunkSize)..<min(last, chunks)
    }

    /// Notes a write. Returns whether it was nothing but zeroes.
    public func didWrite(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) -> Bool {
        let range = offset..<(offset + UInt64(bytes.count))
        if xd_is_zero(bytes.baseAddress, bytes.count) != 0 {
            didZero(range)
            return true
        }
        for chunk in chunks(of: range) {
            guard isWhole(chunk, range) else {
                setKnown(chunk, false)
                continue
            }
            let start = UInt64(chunk) * ChunkDigests.chunkSize
            let part = Int(start - offset)..<Int(min(start + ChunkDigests.chunkSize, size) - offset)
            let data = UnsafeRawBufferPointer(rebasing: bytes[part])
            sums[chunk] = xd_is_zero(data.baseAddress, data.count) != 0 ? 0 : Self.sum(data)
            setKnown(chunk, true)
        }
        return false
    }

    /// Notes zeroes.
    public func didZero(_ range: Range<UInt64>) {
        for chunk in chunks(of: range) {
            if isWhole(chunk, range) {
                sums[chunk] = 0
                setKnown(chunk, true)
            } else if sums[chunk] != 0 {
                setKnown(chunk, false)
            }
        }
    }

    /// Notes that nothing is known of a range any more.
    public func didForget(_ range: Range<UInt64>) { for chunk in chunks(of: range) { setKnown(chunk, false) } }

    /// What the destination has to have.
    public func proof() -> DiskProof {
        var proof = DiskProof(runs: [], sum: "")
        var hash = SumHash()
        var isKnown = true
        var begin = 0
        var chunk = 0
        while chunk < chunks {
            let word = known[chunk / 64] >> UInt64(chunk % 64)
            let same = min((isKnown ? ~word : word).trailingZeroBitCount, 64 - chunk % 64, chunks - chunk)
            chunk += same
            // The run goes on in the next word.
            if same > 0, chunk < chunks, chunk % 64 == 0 { continue }
            if chunk == chunks { break }
            end(begin..<chunk)
            begin = chunk
        }
        end(begin..<chunks)

        func end(_ run: Range<Int>) {
            if isKnown { hash.add(UnsafeBufferPointer(start: sums + run.lowerBound, count: run.count)) }
            proof.runs.append(UInt64(run.count))
            isKnown.toggle()
        }
        proof.sum = hash.text
        return proof
    }
}
