internal import CLinux
internal import Glibc
internal import IO
public import NBD
internal import Synchronization
internal import TLS

/// The digests of an image's chunks, kept up to date while the image is written.
///
/// A disk's digest is the SHA-256 over the SHA-256 values of its consecutive 64 KiB chunks, the last one as it is. The
/// chunks are read back from the image, in passes; see `ChunkMarks` for what happens to a chunk that changes meanwhile.
public final class ChunkDigests: WriteObserver, @unchecked Sendable {
    // Unchecked: the marks are atomic, and one pass at a time writes the digests, each chunk's by one of its workers.

    /// The length of a chunk in bytes.
    public static let chunkSize: UInt64 = 64 << 10
    private static let zeroDigest = HashAlgorithm.sha256.hash([UInt8](repeating: 0, count: Int(chunkSize)))

    private let size: UInt64
    private let chunks: Int
    /// 32 bytes a chunk; a chunk of zeroes has zeroes here, so that the digests of a sparse disk take no memory.
    private let digests: UnsafeMutableRawPointer
    /// The short checksums that are compared with the source's; see `ChunkSums`.
    private let sums: UnsafeMutablePointer<UInt64>
    private let marks: ChunkMarks

    /// One reading of what is marked, by one or several threads that share the work.
    public final class Pass: Sendable {
        /// What is read.
        public enum Extent: Sendable {
            /// All that is marked.
            case marked
            /// What was not changed since the last such pass: the rest may well change again.
            case settled
            /// Everything, whether it is marked or not; what is not what it was when it was read last is marked, and its digest is left
            /// to a later pass.
            case comparison
        }
        private let next: Atomic<Int>
        private let end: Int
        fileprivate let extent: Extent

        /// Begins a pass. Only one at a time may be under way, but for those over other words.
        ///
        /// - Parameters:
        ///   - extent: what is read.
        ///   - words: the words of 64 chunks that it is over; all of them when nil.
        public init(_ extent: Extent = .marked, words: Range<Int>? = nil) {
            self.extent = extent
            next = Atomic(words?.lowerBound ?? 0)
            end = words?.upperBound ?? .max
        }

        /// Whether all of it was given out.
        ///
        /// - Parameter digests: what the pass is over.
        public func isOver(_ digests: ChunkDigests) -> Bool {
            next.load(ordering: .relaxed) >= min(end, digests.words)
        }

        /// How many bytes of a disk were not given out yet, at most.
        ///
        /// - Parameter digests: what the pass is over.
        public func rest(of digests: ChunkDigests) -> UInt64 {
            let words = max(min(end, digests.words) - next.load(ordering: .relaxed), 0)
            return min(UInt64(words) * 64 * ChunkDigests.chunkSize, digests.size)
        }

        /// Some words of marks that nobody else looks at.
        fileprivate func take(of count: Int) -> Range<Int>? {
            let first = next.wrappingAdd(4, ordering: .relaxed).oldValue
            return first < min(count, end) ? first..<min(first + 4, count, end) : nil
        }
    }

    /// How many words of 64 chunks there are.
    public var words: Int { marks.words }

    /// Makes digests for an image of which nothing is known.
    ///
    /// - Parameters:
    ///   - size: its size in bytes.
    ///   - isBlank: whether it is known to be all zeroes.
    /// - Throws: `ChannelError` when there is no memory for so many.
    public init(size: UInt64, isBlank: Bool) throws {
        self.size = size
        chunks = Int((size + Self.chunkSize - 1) / Self.chunkSize)
        guard size <= 1 << 50, let memory = calloc(max(chunks, 1), HashAlgorithm.sha256.digestLength),
            let short = calloc(max(chunks, 1), 8)
        else { throw ChannelError(.system, "A disk of \(size) bytes is too large") }
        digests = memory
        sums = short.bindMemory(to: UInt64.self, capacity: max(chunks, 1))
        marks = ChunkMarks(chunks: chunks, areMarked: !isBlank)
    }

    deinit {
        free(digests)
        free(sums)
    }

    /// Marks the chunks of a range.
    public func didChange(_ offset: UInt64, _ count: UInt64) {
        guard count > 0, chunks > 0 else { return }
        let first = Int(offset / Self.chunkSize)
        let last = min(Int((offset + count - 1) / Self.chunkSize), chunks - 1)
        for word in (first / 64)...(last / 64) {
            let low = word == first / 64 ? UInt64.max << UInt64(first % 64) : UInt64.max
            let high = word == last / 64 ? UInt64.max >> UInt64(63 - last % 64) : UInt64.max
            marks.mark(word, low & high)
        }
    }

    /// Reads every marked chunk of the file and takes its digest. Blocks: run it on the pool.
    ///
    /// The file is read past the page cache where its file system allows that, so that what is read is what the disk has.
    ///
    /// - Parameters:
    ///   - path: the image.
    ///   - pass: the pass of which this is one worker.
    ///   - limit: after how many chunks it may return before the pass is over, for others who want the thread.
    ///   - shouldStop: is asked now and then; the pass then ends early, what is left stays marked.
    /// - Returns: how many chunks were read here.
    @discardableResult
    public func update(from path: String, in pass: Pass = Pass(), limit: Int = .max, shouldStop: () -> Bool = { false })
        throws -> Int
    {
        let file = try RawFile(path: path, readOnly: true)
        let source = try UncachedFile(path)
        let buffer = IOBuffer(capacity: Int(Self.chunkSize) * Self.chunksAtOnce)
        var read = 0
        var hole: Range<UInt64> = 0..<0
        // What was written as data is asked for no hole: that costs a look under the lock that the writers of the file need.
        var wasEmpty = true
        while read < limit, !shouldStop(), let words = pass.take(of: marks.words) {
            for word in words {
                var pending =
                    switch pass.extent {
                    case .marked: marks.take(word)
                    case .settled: marks.takeSettled(word)
                    case .comparison: UInt64.max
                    }
                let isComparison = pass.extent == .comparison
                // What was a hole before these marks were taken may have been written since.
                hole = 0..<0
                while pending != 0 {
                    if shouldStop() {
                        if !isComparison { marks.mark(word, pending) }
                        return read
                    }
                    let bit = pending.trailingZeroBitCount
                    let chunk = word * 64 + bit
                    if chunk >= chunks { break }
                    let start = UInt64(chunk) * Self.chunkSize
                    let isInHole = hole.lowerBound <= start && min(start + Self.chunkSize, size) <= hole.upperBound
                    if !isInHole, wasEmpty {
                        // Only the next data is looked for: looking for the end of data walks over all of it on tmpfs.
                        hole = start..<min(max(file.nextData(from: start), start), size)
                    }
                    if hole.lowerBound <= start, min(start + Self.chunkSize, size) <= hole.upperBound {
                        pending &= pending - 1
                        if !isComparison { setZero(chunk) } else if sums[chunk] != 0 { mark(chunk) }
                        wasEmpty = true
                        continue
                    }
                    let run = run(of: pending, from: bit, chunk)
                    let end = min(start + UInt64(run) * Self.chunkSize, size)
                    do {
                        try source.read(into: buffer.mutable(0..<Int(end - start)), at: start)
                    } catch {
                        marks.mark(word, isComparison ? 0 : pending)
                        throw error
                    }
                    for _ in 0..<run { pending &= pending - 1 }
                    let bytes = buffer.bytes(0..<Int(end - start))
                    if isComparison {
                        for index in 0..<run { compare(chunk + index, Self.chunk(index, of: bytes)) }
                    } else {
                        take(chunk, bytes)
                    }
                    wasEmpty = sums[chunk + run - 1] == 0
                    read += run
                }
            }
        }
        return read
    }

    private static let chunksAtOnce = SHA256Batch.most

    /// How many chunks from one on are read at once.
    private func run(of pending: UInt64, from bit: Int, _ chunk: Int) -> Int {
        min((~(pending >> UInt64(bit))).trailingZeroBitCount, Self.chunksAtOnce, chunks - chunk)
    }

    private static func chunk(_ index: Int, of bytes: UnsafeRawBufferPointer) -> UnsafeRawBufferPointer {
        let from = index * Int(chunkSize)
        return UnsafeRawBufferPointer(rebasing: bytes[from..<min(from + Int(chunkSize), bytes.count)])
    }

    private func setZero(_ chunk: Int) {
        memset(digests + chunk * HashAlgorithm.sha256.digestLength, 0, HashAlgorithm.sha256.digestLength)
        sums[chunk] = 0
    }

    /// Takes the digests of consecutive chunks, of which the last one may be the disk's shorter one.
    private func take(_ first: Int, _ bytes: UnsafeRawBufferPointer) {
        let size = Int(Self.chunkSize)
        // Those that are not zero, and are not hashed yet.
        var run = 0..<0
        func hash() {
            guard !run.isEmpty else { return }
            let part = bytes[(run.lowerBound * size)..<min(run.upperBound * size, bytes.count)]
            let target = digests + (first + run.lowerBound) * HashAlgorithm.sha256.digestLength
            SHA256Batch.hash(UnsafeRawBufferPointer(rebasing: part), each: size, into: target)
        }
        for index in 0..<((bytes.count + size - 1) / size) {
            let chunk = Self.chunk(index, of: bytes)
            if xd_is_zero(chunk.baseAddress, chunk.count) != 0 {
                hash()
                setZero(first + index)
                run = (index + 1)..<(index + 1)
            } else {
                sums[first + index] = ChunkSums.sum(chunk)
                run = run.lowerBound..<(index + 1)
            }
        }
        hash()
    }

    private func mark(_ chunk: Int) { marks.mark(chunk / 64, 1 << UInt64(chunk % 64)) }

    /// Marks a chunk that is not what it was.
    private func compare(_ chunk: Int, _ bytes: UnsafeRawBufferPointer) {
        let sum = xd_is_zero(bytes.baseAddress, bytes.count) != 0 ? 0 : ChunkSums.sum(bytes)
        if sum != sums[chunk] { mark(chunk) }
    }

    /// The digests of some words' chunks as a seed's table has them; see `DigestRuns`. Only right while none of them is marked.
    public func encoded(words: Range<Int>) -> [UInt8] {
        let range = (words.lowerBound * 64)..<min(words.upperBound * 64, chunks)
        let length = DigestRuns.digestLength
        return withUnsafeTemporaryAllocation(byteCount: max(range.count, 1) * length, alignment: 16) { buffer in
            for (index, chunk) in range.enumerated() {
                memcpy(
                    buffer.baseAddress! + index * length,
                    digests + chunk * HashAlgorithm.sha256.digestLength,
                    length
                )
            }
            return DigestRuns.encode(
                UnsafeRawBufferPointer(rebasing: UnsafeRawBufferPointer(buffer)[..<(range.count * length)])
            )
        }
    }

    /// How many bytes were changed since they were read, in whole chunks.
    public var staleBytes: UInt64 { UInt64(marks.count) * Self.chunkSize }

    /// Whether anything was changed since it was read.
    public var isStale: Bool { !marks.isEmpty }

    /// Marks everything, to be read once more.
    public func markAll() { didChange(0, size) }

    /// Whether what was read is what the source says. Only right while nothing is marked.
    public func matches(_ proof: DiskProof) -> Bool {
        guard proof.runs.count <= DiskProof.maximumRuns else { return false }
        var hash = SumHash()
        var chunk = 0
        var isKnown = true
        for run in proof.runs {
            guard run <= UInt64(chunks - chunk) else { return false }
            if isKnown { hash.add(UnsafeBufferPointer(start: sums + chunk, count: Int(run))) }
            chunk += Int(run)
            isKnown.toggle()
        }
        return chunk == chunks && hash.text == proof.sum
    }

    /// The disk's digest in hexadecimal. Only right while nothing is marked.
    public func digest() -> String {
        let length = HashAlgorithm.sha256.digestLength
        let part = 4096
        let zeroes = [UInt8](repeating: 0, count: Int(size % Self.chunkSize))
        let lastZeroDigest = zeroes.isEmpty ? Self.zeroDigest : HashAlgorithm.sha256.hash(zeroes)
        let buffer = IOBuffer(capacity: part * length)
        guard var hash = try? Hash(.sha256) else { preconditionFailure("SHA-256 is always there") }
        for first in stride(from: 0, to: chunks, by: part) {
            let count = min(part, chunks - first)
            let bytes = buffer.mutable(0..<(count * length))
            memcpy(bytes.baseAddress!, digests + first * length, count * length)
            for index in 0..<count where xd_is_zero(bytes.baseAddress! + index * length, length) != 0 {
                let digest = first + index == chunks - 1 ? lastZeroDigest : Self.zeroDigest
                digest.withUnsafeBytes { _ = memcpy(bytes.baseAddress! + index * length, $0.baseAddress!, length) }
            }
            hash.update(UnsafeRawBufferPointer(bytes))
        }
        return hash.finish().hex
    }

    /// The digest of an image that nobody writes. Blocks: run it on the pool.
    public static func digest(of path: String) throws -> String {
        let digests = try ChunkDigests(size: RawFile(path: path, readOnly: true).size, isBlank: false)
        try digests.update(from: path)
        return digests.digest()
    }

    /// The digest of any disk that nobody writes, read in order; what the disk says to be zeroes is not read.
    public static func digest(of disk: any BackEnd) async throws -> String {
        let digests = try ChunkDigests(size: disk.size, isBlank: true)
        var position: UInt64 = 0
        while position < disk.size {
            for extent in try await disk.extents(at: position, count: disk.size - position, limit: 4096) {
                // An extent may begin or end within a chunk, which then is read as a whole.
                let end = position + extent.length
                if !extent.isZero { digests.didChange(position, extent.length) }
                position = end
            }
        }
        try await digests.update(from: disk)
        return digests.digest()
    }

    /// Reads every marked chunk of a disk and takes its digest. A chunk that is marked while it is read stays marked.
    public func update(from disk: any BackEnd, shouldStop: () -> Bool = { false }) async throws {
        let buffer = IOBuffer(capacity: Int(Self.chunkSize) * Self.chunksAtOnce)
        for word in 0..<marks.words {
            var pending = marks.take(word)
            while pending != 0 {
                let bit = pending.trailingZeroBitCount
                let chunk = word * 64 + bit
                if chunk >= chunks { break }
                let run = run(of: pending, from: bit, chunk)
                let start = UInt64(chunk) * Self.chunkSize
                let data = Payload(buffer, 0..<Int(min(UInt64(run) * Self.chunkSize, size - start)))
                do {
                    try await disk.readFully(into: data, at: start)
                } catch {
                    marks.mark(word, pending)
                    throw error
                }
                for _ in 0..<run { pending &= pending - 1 }
                take(chunk, data.bytes)
            }
            if shouldStop() { return }
        }
    }
}
