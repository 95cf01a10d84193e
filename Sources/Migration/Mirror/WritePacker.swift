internal import IO
internal import NBD

/// Compresses the writes of a mirror where that gets more of them across.
struct WritePacker {
    private var choice: CompressionChoice
    private let compressor: ZstdCompressor?
    private var bytes = 0
    private var began: ContinuousClock.Instant?
    private static let pool = BufferPool(keep: 8 << 20)
    /// What is shorter is not worth a try.
    private static let shortest = 4096

    init(_ compression: Compression, line: Double?) {
        choice = CompressionChoice(compression, line: line)
        compressor = choice.level.flatMap { ZstdCompressor(level: $0) }
    }

    /// What is to be sent instead of a write; nil for the write itself.
    mutating func pack(_ payload: Payload) -> Payload? {
        guard let compressor, payload.count >= Self.shortest, choice.next() else { return nil }
        let began = ContinuousClock.now
        let buffer = Self.pool.buffer(payload.count)
        let prefix = NBDWire.compressedSizeSize
        let count = compressor.compress(payload.bytes, into: buffer.mutable(prefix..<payload.count)).map { $0 + prefix }
        guard choice.compressed(payload.count, to: count ?? payload.count, in: .now - began), let count else {
            return nil
        }
        buffer.mutable(0..<prefix).storeBytes(of: UInt32(payload.count).bigEndian, as: UInt32.self)
        return Payload(buffer, 0..<count)
    }

    /// So many bytes have got across.
    mutating func sent(_ count: Int) { bytes += count }

    /// A period is over.
    ///
    /// - Parameter isFull: whether more waited than the line took: what it took then says what it carries.
    mutating func endPeriod(isFull: Bool, now: ContinuousClock.Instant) {
        if let began, isFull { choice.sent(bytes, in: now - began) }
        (began, bytes) = (now, 0)
    }
}
