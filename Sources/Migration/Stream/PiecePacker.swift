internal import IO

/// Compresses the pieces of one connection where that gets more of them across.
struct PiecePacker {
    private var choice: CompressionChoice
    private let compressor: ZstdCompressor?
    /// The last piece that was compressed.
    let result: IOBuffer

    init(_ compression: Compression, line: Double?) {
        choice = CompressionChoice(compression, line: line)
        compressor = choice.level.flatMap { ZstdCompressor(level: $0) }
        result = IOBuffer(capacity: compressor == nil ? 0 : StreamPiece.largest)
    }

    /// What is to be sent of a piece: so many bytes of it, or of `result`.
    mutating func pack(_ piece: UnsafeRawBufferPointer) -> (count: Int, isCompressed: Bool) {
        guard let compressor, choice.next() else { return (piece.count, false) }
        let began = ContinuousClock.now
        let space = result.mutable(StreamPiece.sizeSize..<StreamPiece.largest)
        let count = compressor.compress(piece, into: space).map { $0 + StreamPiece.sizeSize } ?? piece.count
        let isSmaller = choice.compressed(piece.count, to: min(count, piece.count), in: .now - began)
        guard isSmaller else { return (piece.count, false) }
        result.mutable(0..<StreamPiece.sizeSize)
            .storeBytes(of: UInt32(piece.count).bigEndian, as: UInt32.self)
        return (count, true)
    }

    /// The line has taken what was packed.
    mutating func sent(_ count: Int, in time: Duration) { choice.sent(count, in: time) }
}
