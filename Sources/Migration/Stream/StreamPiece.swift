internal import IO

/// The frame of a piece of QEMU's stream on one of several connections: the number of the piece, 8 bytes, and how many bytes follow, 4 bytes,
/// both in network order. Pieces are numbered from 0 over all connections. One without bytes ends its connection, and its number is how many
/// pieces the stream has. The highest bit of the count says that the piece is compressed: its bytes are the size that it had, 4 bytes, and what
/// zstd made of it.
public struct StreamPiece: Sendable, Hashable {
    /// Bytes of the frame before the piece.
    public static let headerSize = 12
    /// The most bytes of a piece.
    public static let largest = 256 << 10
    private static let compressedBit: UInt32 = 1 << 31
    /// Connections that share a stream at most.
    public static let mostLanes = 16

    /// Bytes of an acknowledgement: how many pieces were passed on in all, in network order.
    static let acknowledgementSize = 8

    /// Reads an acknowledgement.
    static func acknowledged(parsing bytes: UnsafeRawBufferPointer) -> UInt64 {
        bytes.loadUnaligned(as: UInt64.self).bigEndian
    }

    /// Writes an acknowledgement.
    static func acknowledge(_ number: UInt64, into bytes: UnsafeMutableRawBufferPointer) {
        bytes.storeBytes(of: number.bigEndian, as: UInt64.self)
    }

    /// Which piece it is.
    public var number: UInt64
    /// The bytes that follow; 0 for the end.
    public var count: Int
    /// Whether they have to be decompressed.
    public var isCompressed: Bool

    /// Describes a piece.
    public init(number: UInt64, count: Int, isCompressed: Bool = false) {
        self.number = number
        self.count = count
        self.isCompressed = isCompressed
    }

    /// Reads a frame of `headerSize` bytes.
    ///
    /// - Throws: `ChannelError` with `protocolViolation` for a piece that is too large.
    public init(parsing header: UnsafeRawBufferPointer) throws {
        number = header.loadUnaligned(fromByteOffset: 0, as: UInt64.self).bigEndian
        let field = header.loadUnaligned(fromByteOffset: 8, as: UInt32.self).bigEndian
        isCompressed = field & Self.compressedBit != 0
        let count = field & ~Self.compressedBit
        guard !isCompressed || count > Packer.prefix else {
            throw ChannelError(.protocolViolation, "A compressed piece of the migration stream has \(count) bytes")
        }
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
        let field = UInt32(count) | (isCompressed ? Self.compressedBit : 0)
        header.storeBytes(of: field.bigEndian, toByteOffset: 8, as: UInt32.self)
    }

    /// Reads the size that a compressed piece had, from the first of its bytes.
    ///
    /// - Throws: `ChannelError` with `protocolViolation` for one that no piece has.
    static func size(parsing bytes: UnsafeRawBufferPointer) throws -> Int {
        let size = bytes.loadUnaligned(as: UInt32.self).bigEndian
        guard (1...UInt32(largest)).contains(size) else {
            throw ChannelError(
                .protocolViolation,
                "A compressed piece of the migration stream would have \(size) bytes"
            )
        }
        return Int(size)
    }
}
