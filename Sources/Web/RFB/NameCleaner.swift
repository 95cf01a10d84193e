/// Makes a name in UTF-8 fit to be shown, in its place and piece by piece: what would steer a terminal, end a line or turn the direction of writing
/// around becomes something that does not, of the same length.
struct NameCleaner: Sendable {
    /// The two bytes before the next one.
    private var before: (UInt8, UInt8) = (0, 0)

    /// Cleans the next bytes.
    mutating func clean(_ bytes: UnsafeMutableRawBufferPointer) {
        for index in bytes.indices {
            let byte = bytes[index]
            switch (before.0, before.1, byte) {
            case (_, _, 0..<32), (_, _, 127): bytes[index] = UInt8(ascii: "?")
            // U+0080 to U+009F: a no-break space.
            case (_, 0xc2, 0x80..<0xa0): bytes[index] = 0xa0
            // U+2028 to U+202E: a hyphen.
            case (0xe2, 0x80, 0xa8...0xae): bytes[index] = 0x90
            // U+2066 to U+2069: a mathematical space.
            case (0xe2, 0x81, 0xa6...0xa9): bytes[index] = 0x9f
            default: break
            }
            before = (before.1, byte)
        }
    }
}
