/// Compresses pieces where that gets more of them across, each with its size before it, 4 bytes in network order. For one user at a time.
public struct Packer {
    /// Bytes before what zstd made of a piece.
    public static let prefix = 4

    private var choice: CompressionChoice
    private let compressor: ZstdCompressor?

    /// Makes a packer.
    ///
    /// - Parameters:
    ///   - compression: what was asked for.
    ///   - line: what the line was measured to take, in bytes per second; nil when it was not.
    public init(_ compression: Compression, line: Double?) {
        choice = CompressionChoice(compression, line: line)
        compressor = choice.level.flatMap { ZstdCompressor(level: $0) }
    }

    /// Whether anything is ever compressed.
    public var mayPack: Bool { compressor != nil }

    /// Whether the next piece is to be tried; each answer is followed by `pack` if it is yes.
    public mutating func wantsNext() -> Bool { compressor != nil && choice.next() }

    /// Compresses a piece.
    ///
    /// - Parameters:
    ///   - piece: at most 4 GiB.
    ///   - target: where its size and the result go.
    /// - Returns: the bytes of both; nil when the piece is to be sent as it is.
    public mutating func pack(_ piece: UnsafeRawBufferPointer, into target: UnsafeMutableRawBufferPointer) -> Int? {
        guard let compressor, target.count > Self.prefix else { return nil }
        let began = ContinuousClock.now
        let space = UnsafeMutableRawBufferPointer(rebasing: target[Self.prefix...])
        let count = compressor.compress(piece, into: space).map { $0 + Self.prefix } ?? piece.count
        guard choice.compressed(piece.count, to: min(count, piece.count), in: .now - began) else { return nil }
        target.storeBytes(of: UInt32(piece.count).bigEndian, as: UInt32.self)
        return count
    }

    /// The line has taken so many bytes in that time, and more were waiting.
    public mutating func sent(_ bytes: Int, in time: Duration) { choice.sent(bytes, in: time) }

    /// The line was seen to take so many bytes per second, while more were waiting.
    public mutating func measured(line rate: Double) { choice.measured(line: rate) }
}
