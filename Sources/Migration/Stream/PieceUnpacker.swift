internal import IO

/// Decompresses the pieces of one connection.
///
/// Used by who receives a connection, and its result by who passes it on, one of them at a time.
final class PieceUnpacker: @unchecked Sendable {
    // Unchecked: handed from loop to loop.
    private let decompressor: ZstdDecompressor
    /// The last piece.
    let result = IOBuffer(capacity: StreamPiece.largest)

    /// - Throws: `ChannelError` when there is no memory for it.
    init() throws {
        guard let decompressor = ZstdDecompressor() else {
            throw ChannelError(.system, "There is no memory to decompress the migration stream")
        }
        self.decompressor = decompressor
    }

    /// Decompresses a piece into `result`.
    ///
    /// - Returns: its bytes.
    /// - Throws: `ChannelError` with `protocolViolation` for one that is damaged.
    func unpack(_ piece: UnsafeRawBufferPointer) throws -> Int {
        let count = try StreamPiece.size(parsing: piece)
        let rest = UnsafeRawBufferPointer(rebasing: piece[Packer.prefix...])
        try decompressor.decompress(rest, into: result.mutable(0..<count))
        return count
    }
}
