internal import IO

/// The frame of a piece of QEMU's stream on one of several connections: the number of the piece, 8 bytes, and how many bytes follow, 4 bytes,
/// both in network order. Pieces are numbered from 0 over all connections. One without bytes ends its connection, and its number is how many
/// pieces the stream has.
public struct StreamPiece: Sendable, Hashable {
    /// Bytes of the frame before the piece.
    public static let headerSize = 12
    /// The most bytes of a piece.
    public static let largest = 256 << 10
    /// Connections that share a stream at most.
    public static let mostLanes = 16

    /// Which piece it is.
    public var number: UInt64
    /// Its bytes; 0 for the end.
    public var count: Int

    /// Describes a piece.
    public init(number: UInt64, count: Int) {
        self.number = number
        self.count = count
    }

    /// Reads a frame of `headerSize` bytes.
    ///
    /// - Throws: `ChannelError` with `protocolViolation` for a piece that is too large.
    public init(parsing header: UnsafeRawBufferPointer) throws {
        number = header.loadUnaligned(fromByteOffset: 0, as: UInt64.self).bigEndian
        let count = header.loadUnaligned(fromByteOffset: 8, as: UInt32.self).bigEndian
        guard count <= Self.largest else {
            throw ChannelError(
                .protocolViolation,
                "A piece of the migration stream has \(count) bytes, more than \(Self.largest)"
            )
        }
        self.count = Int(count)
    }

    /// Writes the frame's `headerSize` bytes.
    public func write(into header: UnsafeMutableRawBufferPointer) {
        header.storeBytes(of: number.bigEndian, toByteOffset: 0, as: UInt64.self)
        header.storeBytes(of: UInt32(count).bigEndian, toByteOffset: 8, as: UInt32.self)
    }
}
