/// The numbers of the NBD protocol (NBD specification, `doc/proto.md`). All integers on the wire are big-endian.
public enum NBDWire {
    static let greetingMagic: UInt64 = 0x4e42_444d_4147_4943
    static let optionMagic: UInt64 = 0x4948_4156_454f_5054
    static let optionReplyMagic: UInt64 = 0x0003_e889_0455_65a9
    static let requestMagic: UInt32 = 0x2560_9513
    static let simpleReplyMagic: UInt32 = 0x6744_6698
    static let structuredReplyMagic: UInt32 = 0x668e_33ef
    static let extendedRequestMagic: UInt32 = 0x21e4_1c71
    static let extendedReplyMagic: UInt32 = 0x6e8a_278c
    static let simpleReplySize = 16
    /// The most extents that one reply to BLOCK_STATUS may have.
    static let maximumExtents = 1 << 20
    /// The longest string that the protocol allows, in bytes.
    static let maximumString = 4096
    /// The longest option payload that is read; every legal one fits.
    static let maximumOption = 8192
    /// The longest payload of a READ or WRITE.
    public static let maximumPayload = 32 << 20
    /// A write whose payload is compressed: as `Packer` makes it. Not of the specification, which leaves such
    /// numbers alone: both sides have agreed on it elsewhere, extended headers are in use, and only an export that takes it knows it.
    static let compressedWrite: UInt16 = 0x4358
    /// The port that the protocol is assigned.
    public static let port: UInt16 = 10809
}

/// The handshake flags of the server's greeting.
struct HandshakeFlags: OptionSet {
    let rawValue: UInt16
    static let fixedNewstyle = HandshakeFlags(rawValue: 1 << 0)
    static let noZeroes = HandshakeFlags(rawValue: 1 << 1)
}

enum NBDOption: UInt32 {
    case exportName = 1
    case abort = 2
    case list = 3
    case startTLS = 5
    case info = 6
    case go = 7
    case structuredReply = 8
    case listMetaContext = 9
    case setMetaContext = 10
    case extendedHeaders = 11
}

enum NBDOptionReply {
    static let ack: UInt32 = 1
    static let server: UInt32 = 2
    static let info: UInt32 = 3
    static let metaContext: UInt32 = 4
    static let errorBit: UInt32 = 1 << 31
    static let unsupported = errorBit | 1
    static let policy = errorBit | 2
    static let invalid = errorBit | 3
    static let platform = errorBit | 4
    static let tlsRequired = errorBit | 5
    static let unknown = errorBit | 6
    static let shutdown = errorBit | 7
    static let blockSizeRequired = errorBit | 8
    static let tooBig = errorBit | 9
    static let extendedHeadersRequired = errorBit | 10

    static func isError(_ type: UInt32) -> Bool { type & errorBit != 0 }
}

enum NBDInfo {
    static let export: UInt16 = 0
    static let name: UInt16 = 1
    static let description: UInt16 = 2
    static let blockSize: UInt16 = 3
}

/// What a server says about an export.
public struct TransmissionFlags: OptionSet, Sendable {
    /// The bits.
    public let rawValue: UInt16
    /// Makes a set from bits.
    public init(rawValue: UInt16) { self.rawValue = rawValue }
    /// The other bits mean something.
    public static let hasFlags = TransmissionFlags(rawValue: 1 << 0)
    /// Writes are refused.
    public static let readOnly = TransmissionFlags(rawValue: 1 << 1)
    /// FLUSH is understood.
    public static let sendFlush = TransmissionFlags(rawValue: 1 << 2)
    /// FUA is understood.
    public static let sendFUA = TransmissionFlags(rawValue: 1 << 3)
    /// The medium turns, so that order matters.
    public static let rotational = TransmissionFlags(rawValue: 1 << 4)
    /// TRIM is understood.
    public static let sendTrim = TransmissionFlags(rawValue: 1 << 5)
    /// WRITE_ZEROES is understood.
    public static let sendWriteZeroes = TransmissionFlags(rawValue: 1 << 6)
    /// DF is understood.
    public static let sendDF = TransmissionFlags(rawValue: 1 << 7)
    /// A flush on one connection covers the completed writes of all.
    public static let canMultiConn = TransmissionFlags(rawValue: 1 << 8)
    /// CACHE is understood.
    public static let sendCache = TransmissionFlags(rawValue: 1 << 10)
    /// FAST_ZERO is understood.
    public static let sendFastZero = TransmissionFlags(rawValue: 1 << 11)
    /// BLOCK_STATUS may name the contexts that it is about (extended headers only).
    public static let blockStatusPayload = TransmissionFlags(rawValue: 1 << 12)
}

/// The requests of the transmission phase.
public enum NBDCommand: UInt16, Sendable {
    /// Read data.
    case read = 0
    /// Write data.
    case write = 1
    /// Say goodbye; there is no reply.
    case disconnect = 2
    /// Make completed writes durable.
    case flush = 3
    /// Discard data; later reads are undefined.
    case trim = 4
    /// Bring data close, for reads that follow.
    case cache = 5
    /// Make a range read as zeroes.
    case writeZeroes = 6
    /// Ask about allocation.
    case blockStatus = 7
}

/// The flags of a request.
public struct CommandFlags: OptionSet, Sendable {
    /// The bits.
    public let rawValue: UInt16
    /// Makes a set from bits.
    public init(rawValue: UInt16) { self.rawValue = rawValue }
    /// Reply once the data is durable.
    public static let fua = CommandFlags(rawValue: 1 << 0)
    /// Zeroes must be allocated.
    public static let noHole = CommandFlags(rawValue: 1 << 1)
    /// One chunk only.
    public static let doNotFragment = CommandFlags(rawValue: 1 << 2)
    /// One extent only.
    public static let requestOne = CommandFlags(rawValue: 1 << 3)
    /// Fail rather than write zeroes slowly.
    public static let fastZero = CommandFlags(rawValue: 1 << 4)
    /// The length is that of a payload that follows (extended headers only).
    public static let payloadLength = CommandFlags(rawValue: 1 << 5)
}

enum NBDChunk {
    static let done: UInt16 = 1
    static let none: UInt16 = 0
    static let offsetData: UInt16 = 1
    static let offsetHole: UInt16 = 2
    static let blockStatus: UInt16 = 5
    static let extendedBlockStatus: UInt16 = 6
    static let error: UInt16 = 1 << 15 | 1
    static let errorOffset: UInt16 = 1 << 15 | 2
}
