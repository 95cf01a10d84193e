/// How pixels are written: PIXEL_FORMAT of RFC 6143, section 7.4.
package struct PixelFormat: Sendable, Hashable {
    /// As it is sent, 16 bytes.
    package let bytes: [UInt8]
    /// The length of a pixel: 1, 2 or 4 bytes.
    package let bytesPerPixel: Int
    /// The length of a pixel of Tight and TightPNG (TPIXEL): 3 bytes where the three colours have 8 bits each of 32, as QEMU sees it.
    package let bytesPerTightPixel: Int

    /// How many bytes one has.
    package static let count = 16

    /// Reads a format.
    ///
    /// - Throws: `RFBFailure.violation` for one that has not 8, 16 or 32 bits for a pixel.
    package init(_ bytes: some Collection<UInt8>) throws(RFBFailure) {
        let bytes = Array(bytes)
        guard bytes.count == Self.count else { throw .violation("a pixel format has \(bytes.count) bytes") }
        guard [8, 16, 32].contains(bytes[0]) else { throw .violation("a pixel has \(bytes[0]) bits") }
        self.bytes = bytes
        let hasColours = bytes[3] != 0
        // QEMU sends indices of one byte to who wants a map of colours.
        bytesPerPixel = hasColours ? Int(bytes[0] / 8) : 1
        let has24Bits = hasColours && bytes[0] == 32 && bytes[4...9].elementsEqual([0, 255, 0, 255, 0, 255])
        bytesPerTightPixel = has24Bits ? 3 : bytesPerPixel
    }
}

/// Where something is on a screen.
package struct RFBRectangle: Sendable, Hashable {
    /// The left edge, in pixels.
    package var x: UInt16
    /// The upper edge.
    package var y: UInt16
    /// How wide it is.
    package var width: UInt16
    /// How high it is.
    package var height: UInt16

    /// Names a rectangle.
    package init(x: UInt16 = 0, y: UInt16 = 0, width: UInt16, height: UInt16) {
        (self.x, self.y, self.width, self.height) = (x, y, width, height)
    }

    /// Reads the first eight bytes.
    init(_ bytes: some Collection<UInt8>) {
        var reader = RFBReader(bytes)
        (x, y, width, height) = (reader.u16(), reader.u16(), reader.u16(), reader.u16())
    }

    /// The pixels in it.
    var area: UInt64 { UInt64(width) * UInt64(height) }
    /// The bytes of a bit for each pixel, whose rows begin with whole bytes.
    var bitmap: UInt64 { (UInt64(width) + 7) / 8 * UInt64(height) }
    /// As it is sent.
    var bytes: [UInt8] { x.rfb + y.rfb + width.rfb + height.rfb }
}

/// Takes numbers from the front of bytes that are known to be there; what is missing is 0.
struct RFBReader {
    private var rest: ArraySlice<UInt8>

    init(_ bytes: some Collection<UInt8>) { rest = Array(bytes)[...] }

    mutating func u8() -> UInt8 { rest.popFirst() ?? 0 }
    mutating func u16() -> UInt16 { UInt16(u8()) << 8 | UInt16(u8()) }
    mutating func u32() -> UInt32 { UInt32(u16()) << 16 | UInt32(u16()) }
    mutating func s32() -> Int32 { Int32(bitPattern: u32()) }
    mutating func bytes(_ count: Int) -> [UInt8] {
        defer { rest = rest.dropFirst(count) }
        return Array(rest.prefix(count))
    }
}

extension FixedWidthInteger {
    /// As the protocol has it: the most significant byte first.
    var rfb: [UInt8] { withUnsafeBytes(of: bigEndian) { Array($0) } }
}
