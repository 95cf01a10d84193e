internal import IO

/// Compresses the pieces of one connection where that gets more of them across.
struct PiecePacker {
    private var packer: Packer
    /// The last piece that was compressed.
    let result: IOBuffer

    init(_ compression: Compression, line: Double?) {
        packer = Packer(compression, line: line)
        result = IOBuffer(capacity: packer.mayPack ? StreamPiece.largest : 0)
    }

    /// What is to be sent of a piece: so many bytes of it, or of `result`.
    mutating func pack(_ piece: UnsafeRawBufferPointer) -> (count: Int, isCompressed: Bool) {
        guard packer.wantsNext(), let count = packer.pack(piece, into: result.mutable(0..<StreamPiece.largest)) else {
            return (piece.count, false)
        }
        return (count, true)
    }

    /// The line has taken what was packed.
    mutating func sent(_ count: Int, in time: Duration) { packer.sent(count, in: time) }

    /// The line was seen to take so many bytes per second, while more were waiting.
    mutating func measured(line rate: Double) { packer.measured(line: rate) }
}
