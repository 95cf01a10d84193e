/// The head of a websocket frame (RFC 6455, section 5.2).
public struct WebSocketFrameHead: Sendable, Equatable {
    /// What a frame is.
    public enum Opcode: UInt8, Sendable {
        /// A further piece of a message.
        case continuation = 0
        /// The first piece of a message of text.
        case text = 1
        /// The first piece of a message of bytes.
        case binary = 2
        /// The end.
        case close = 8
        /// A question whether the peer is there.
        case ping = 9
        /// The answer.
        case pong = 10

        /// Control frames are short, whole, and may come between the pieces of a message.
        public var isControl: Bool { rawValue >= 8 }
    }

    /// Whether it is the last piece of its message.
    public var isFinal: Bool
    /// What it is.
    public var opcode: Opcode
    /// The mask of the payload, as a client's frame has one.
    public var mask: UInt32?
    /// The length of the payload in bytes.
    public var length: UInt64

    /// Makes a head.
    public init(isFinal: Bool, opcode: Opcode, mask: UInt32?, length: UInt64) {
        self.isFinal = isFinal
        self.opcode = opcode
        self.mask = mask
        self.length = length
    }

    /// How long a head is at most.
    public static let maximumLength = 14

    /// The result of parsing.
    public enum Parsed: Sendable, Equatable {
        /// More bytes are needed.
        case incomplete
        /// A head, and how many bytes it took.
        case head(WebSocketFrameHead, size: Int)
        /// The bytes are no frame that may be sent, and why.
        case violation(String)
    }

    /// Parses a head.
    ///
    /// - Parameters:
    ///   - bytes: what is there.
    ///   - masked: whether frames of this direction must be masked, as a client's must, or must not be.
    public static func parse(_ bytes: UnsafeRawBufferPointer, masked: Bool) -> Parsed {
        guard bytes.count >= 2 else { return .incomplete }
        guard bytes[0] & 0x70 == 0 else { return .violation("a reserved bit is set without an extension") }
        guard let opcode = Opcode(rawValue: bytes[0] & 0x0f) else {
            return .violation("opcode \(bytes[0] & 0x0f) is reserved")
        }
        let isFinal = bytes[0] & 0x80 != 0
        guard (bytes[1] & 0x80 != 0) == masked else {
            return .violation(masked ? "a client's frame is not masked" : "a server's frame is masked")
        }
        var length = UInt64(bytes[1] & 0x7f)
        if opcode.isControl {
            guard isFinal else { return .violation("a control frame is fragmented") }
            guard length <= 125 else { return .violation("a control frame is longer than 125 bytes") }
        }
        var size = 2
        if length >= 126 {
            let count = length == 126 ? 2 : 8
            guard bytes.count >= size + count else { return .incomplete }
            length = 0
            for index in 0..<count { length = length << 8 | UInt64(bytes[size + index]) }
            size += count
            guard length > (count == 2 ? 125 : 0xffff) else {
                return .violation("a length is not in its shortest form")
            }
            guard length >> 63 == 0 else { return .violation("a length has its highest bit set") }
        }
        var mask: UInt32?
        if masked {
            guard bytes.count >= size + 4 else { return .incomplete }
            mask = bytes.loadUnaligned(fromByteOffset: size, as: UInt32.self)
            size += 4
        }
        return .head(WebSocketFrameHead(isFinal: isFinal, opcode: opcode, mask: mask, length: length), size: size)
    }

    /// Writes the head. Returns its length.
    public func write(to buffer: UnsafeMutableRawBufferPointer) -> Int {
        buffer[0] = (isFinal ? 0x80 : 0) | opcode.rawValue
        let flag: UInt8 = mask == nil ? 0 : 0x80
        var size = 2
        if length <= 125 {
            buffer[1] = flag | UInt8(length)
        } else {
            let count = length <= 0xffff ? 2 : 8
            buffer[1] = flag | (count == 2 ? 126 : 127)
            for index in 0..<count {
                buffer[2 + index] = UInt8(truncatingIfNeeded: length >> UInt64(8 * (count - 1 - index)))
            }
            size += count
        }
        if let mask {
            buffer.storeBytes(of: mask, toByteOffset: size, as: UInt32.self)
            size += 4
        }
        return size
    }

    /// Applies a mask in place.
    ///
    /// - Parameters:
    ///   - mask: four bytes, in memory order.
    ///   - bytes: the payload, or a part of it.
    ///   - offset: where the part begins in the payload.
    public static func apply(_ mask: UInt32, to bytes: UnsafeMutableRawBufferPointer, offset: Int) {
        let shift = UInt32(offset & 3) * 8
        let rotated = shift == 0 ? mask : mask >> shift | mask << (32 - shift)
        let wide = UInt64(rotated) | UInt64(rotated) << 32
        var index = 0
        while index + 8 <= bytes.count {
            let value = bytes.loadUnaligned(fromByteOffset: index, as: UInt64.self)
            bytes.storeBytes(of: value ^ wide, toByteOffset: index, as: UInt64.self)
            index += 8
        }
        withUnsafeBytes(of: rotated) { key in
            while index < bytes.count {
                bytes[index] ^= key[index & 3]
                index += 1
            }
        }
    }
}
