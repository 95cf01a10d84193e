internal import CZstd

/// Compresses pieces of data, each by itself, with zstd (RFC 8878). For one user at a time.
public final class ZstdCompressor {
    /// The levels that may be asked for: higher ones take longer and compress better.
    public static let levels = 1...19

    private let context: OpaquePointer
    private let level: Int32

    /// Makes a compressor; nil when there is no memory for one.
    ///
    /// - Parameter level: one of `levels`.
    public init?(level: Int) {
        guard let context = ZSTD_createCCtx() else { return nil }
        self.context = context
        self.level = Int32(clamping: level)
    }

    deinit { ZSTD_freeCCtx(context) }

    /// Compresses a piece.
    ///
    /// - Parameters:
    ///   - source: the piece.
    ///   - target: where the result goes.
    /// - Returns: the bytes of the result; nil when it does not fit.
    public func compress(_ source: UnsafeRawBufferPointer, into target: UnsafeMutableRawBufferPointer) -> Int? {
        let count = ZSTD_compressCCtx(
            context,
            target.baseAddress,
            target.count,
            source.baseAddress,
            source.count,
            level
        )
        return ZSTD_isError(count) == 0 ? count : nil
    }
}

/// Undoes what `ZstdCompressor` did. For one user at a time.
public final class ZstdDecompressor {
    private let context: OpaquePointer

    /// Makes a decompressor; nil when there is no memory for one.
    public init?() {
        guard let context = ZSTD_createDCtx() else { return nil }
        self.context = context
    }

    deinit { ZSTD_freeDCtx(context) }

    /// Decompresses a piece that fills the target. Whatever the source holds, nothing is written beyond the target.
    ///
    /// - Throws: `ChannelError` with `protocolViolation` for what was not compressed so, or is of another size.
    public func decompress(_ source: UnsafeRawBufferPointer, into target: UnsafeMutableRawBufferPointer) throws {
        let count = ZSTD_decompressDCtx(context, target.baseAddress, target.count, source.baseAddress, source.count)
        guard ZSTD_isError(count) == 0, count == target.count else {
            throw ChannelError(.protocolViolation, "A compressed piece is not what its \(target.count) bytes become")
        }
    }
}
