internal import IO
internal import NBD

/// Compresses the writes of a mirror where that gets more of them across.
struct WritePacker {
    private var packer: Packer
    private var bytes = 0
    private var began: ContinuousClock.Instant?
    private static let pool = BufferPool(keep: 8 << 20)
    /// What is shorter is not worth a try.
    private static let shortest = 4096

    init(_ compression: Compression, line: Double?) { packer = Packer(compression, line: line) }

    /// What is to be sent instead of a write; nil for the write itself.
    mutating func pack(_ payload: Payload) -> Payload? {
        guard payload.count >= Self.shortest, packer.wantsNext() else { return nil }
        let buffer = Self.pool.buffer(payload.count)
        return packer.pack(payload.bytes, into: buffer.mutable(0..<payload.count)).map { Payload(buffer, 0..<$0) }
    }

    /// So many bytes have got across.
    mutating func sent(_ count: Int) { bytes += count }

    /// A period is over.
    ///
    /// - Parameter isFull: whether more waited than the line took: what it took then says what it carries.
    mutating func endPeriod(isFull: Bool, now: ContinuousClock.Instant) {
        if let began, isFull { packer.sent(bytes, in: now - began) }
        (began, bytes) = (now, 0)
    }
}
