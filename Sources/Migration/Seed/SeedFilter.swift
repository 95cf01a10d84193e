internal import CLinux
internal import Glibc
internal import IO
internal import TLS

/// Takes out of what a mirror writes what the destination has already, as its table says.
///
/// A chunk counts as being there until something else is sent for it, if only for a part of it: from then on it is sent as ever. A write
/// waits for the table to come by, but never for a table that has stopped to come. Confined to the relay's loop.
final class SeedFilter: @unchecked Sendable {
    // Unchecked: confined to the relay's loop.

    /// A part of a write.
    struct Part: Equatable {
        var range: Range<UInt64>
        /// Whether the destination has it.
        var isThere: Bool
    }

    /// How long the table may be silent.
    static let patience = Duration.seconds(10)
    /// How many chunks behind the furthest write may still be asked for: QEMU has 16 MiB under way at once.
    private static let slack = 4096

    private let size: UInt64
    private var table: SeedTable
    /// A bit for each chunk for which something was sent.
    private var changed: [UInt64]
    private var furthest = 0
    private var isOver = false
    private let arrived = AsyncCondition()
    private let hasRoom = AsyncCondition()
    private var connection: MessageConnection?

    init(size: UInt64) {
        self.size = size
        let chunks = Int((size + ChunkDigests.chunkSize - 1) / ChunkDigests.chunkSize)
        table = SeedTable(chunks: chunks)
        changed = [UInt64](repeating: 0, count: (chunks + 63) / 64)
    }

    // MARK: The table

    /// Receives the table to its end.
    ///
    /// - Returns: why it broke off; nil when it did not, or nobody wants it any more.
    func follow(_ connection: MessageConnection) async -> String? {
        self.connection = connection
        defer {
            connection.close()
            self.connection = nil
        }
        do {
            while !isOver, !table.isComplete {
                guard table.hasRoom else {
                    await hasRoom.wait()
                    continue
                }
                let frame = try await connection.channel.withDeadline(Self.patience, for: "The table of a seed") {
                    try await connection.receive()
                }
                guard !isOver else { return nil }
                switch frame {
                case .data(let bytes):
                    try table.append(bytes)
                    table.release(before: furthest - Self.slack)
                    arrived.signal()
                case .message(.abort(let reason)): throw ChannelError(.closed, reason)
                case .message: throw ChannelError(.protocolViolation, "A message where a table of digests was due")
                }
            }
            arrived.signal()
            return nil
        } catch {
            let wasWanted = !isOver
            end()
            return wasWanted ? "\(error)" : nil
        }
    }

    /// No more of the table is wanted: what is not known yet is sent.
    func end() {
        isOver = true
        connection?.channel.abort(ChannelError(.closed, "The table of the seed is not wanted any more"))
        arrived.signal()
        hasRoom.signal()
    }

    /// Whether a range may be judged without waiting.
    func isReached(_ range: Range<UInt64>) -> Bool {
        range.isEmpty || isOver || Int((range.upperBound - 1) / ChunkDigests.chunkSize) < table.end
    }

    /// Waits until the table has come as far as a range, or will not.
    func reach(_ range: Range<UInt64>) async {
        while !isReached(range) {
            advance(to: Int((range.upperBound - 1) / ChunkDigests.chunkSize))
            await arrived.wait()
        }
    }

    /// The copy has come to a chunk: what lies far behind it may be given up for what is to come.
    private func advance(to chunk: Int) {
        furthest = max(furthest, chunk)
        guard !table.hasRoom else { return }
        table.release(before: furthest - Self.slack)
        if table.hasRoom { hasRoom.signal() }
    }

    // MARK: Judging

    /// Splits what is about to be written into what is there and what has to be sent, which counts as changed from now on.
    func split(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) -> [Part] {
        let (size, length) = (Int(ChunkDigests.chunkSize), HashAlgorithm.sha256.digestLength)
        // Where the first chunk begins that may be whole.
        let first = Int((ChunkDigests.chunkSize - offset % ChunkDigests.chunkSize) % ChunkDigests.chunkSize)
        return withUnsafeTemporaryAllocation(byteCount: (bytes.count / size + 1) * length, alignment: 64) { digests in
            var areTaken = false
            return split(offset..<(offset + UInt64(bytes.count))) { chunk in
                let from = Int(chunk.lowerBound - offset)
                let part = UnsafeRawBufferPointer(rebasing: bytes[from..<Int(chunk.upperBound - offset)])
                if xd_is_zero(part.baseAddress, part.count) != 0 { return Self.isZero }
                return { known in
                    guard let base = digests.baseAddress, let told = known.baseAddress else { return false }
                    // While the copy passes for the first time it asks for all of them, and together they cost half.
                    if !areTaken {
                        let whole = UnsafeRawBufferPointer(rebasing: bytes[first...])
                        SHA256Batch.hash(whole, each: size, into: base)
                        areTaken = true
                    }
                    return memcmp(base + (from - first) / size * length, told, DigestRuns.digestLength) == 0
                }
            }
        }
    }

    /// The same for a range of zeroes.
    func splitZeroes(_ range: Range<UInt64>) -> [Part] { split(range) { _ in Self.isZero } }

    private static func isZero(_ digest: UnsafeRawBufferPointer) -> Bool {
        xd_is_zero(digest.baseAddress, digest.count) != 0
    }

    private func split(
        _ range: Range<UInt64>,
        _ comparison: (Range<UInt64>) -> ((UnsafeRawBufferPointer) -> Bool)
    ) -> [Part] {
        if !range.isEmpty { advance(to: Int((range.upperBound - 1) / ChunkDigests.chunkSize)) }
        var parts: [Part] = []
        var start = range.lowerBound
        while start < range.upperBound {
            let chunk = Int(start / ChunkDigests.chunkSize)
            let begin = UInt64(chunk) * ChunkDigests.chunkSize
            let end = min(begin + ChunkDigests.chunkSize, size)
            let piece = start..<min(end, range.upperBound)
            let mayBeThere = piece == begin..<end && changed[chunk / 64] & 1 << UInt64(chunk % 64) == 0
            let isThere = mayBeThere && table.withDigest(of: chunk, { comparison(piece)($0) }) == true
            if !isThere { changed[chunk / 64] |= 1 << UInt64(chunk % 64) }
            if let last = parts.last, last.isThere == isThere {
                parts[parts.count - 1].range = last.range.lowerBound..<piece.upperBound
            } else {
                parts.append(Part(range: piece, isThere: isThere))
            }
            start = piece.upperBound
        }
        return parts
    }

    /// Notes that a range is sent whatever is there.
    func didChange(_ range: Range<UInt64>) { _ = split(range) { _ in { _ in false } } }
}
