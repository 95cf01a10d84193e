import IO

/// A guest that writes what its keyboard sends, as codes of set 1, to its serial port and onto its screen: a letter pressed and let go of makes
/// "1E 9E ". It is a boot sector.
public enum KeyboardGuest {
    /// Takes the interrupt of the keyboard (vector 9) and halts; of each code (port 0x60) the handler writes two digits and a space, each to port
    /// 0x3f8 and to the memory of the text screen; an asterisk comes first. No cursor blinks.
    private static let program: [UInt8] = [
        0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xc7, 0x06, 0x24, 0x00, 0x2a, 0x7c, 0xa3, 0x26,
        0x00, 0xba,
        0xd4, 0x03, 0xb8, 0x0a, 0x20, 0xef, 0xb8, 0x00, 0xb8, 0x8e, 0xc0, 0x31, 0xff, 0xb0, 0x2a, 0xe8, 0x27, 0x00,
        0xfb, 0xf4,
        0xeb, 0xfd, 0xe4, 0x60, 0x88, 0xc3, 0xc0, 0xe8, 0x04, 0xe8, 0x11, 0x00, 0x88, 0xd8, 0x24, 0x0f, 0xe8, 0x0a,
        0x00, 0xb0,
        0x20, 0xe8, 0x0d, 0x00, 0xb0, 0x20, 0xe6, 0x20, 0xcf, 0x04, 0x30, 0x3c, 0x39, 0x76, 0x02, 0x04, 0x07, 0xba,
        0xf8, 0x03,
        0xee, 0xb4, 0x1f, 0xab, 0xc3,
    ]

    /// Makes the disk that it starts from, as large as a firmware finds cylinders on it.
    public static func makeDisk(_ path: String) throws {
        let sector = program + [UInt8](repeating: 0, count: 510 - program.count) + [0x55, 0xaa]
        try DurableFile.write(sector + [UInt8](repeating: 0, count: (4 << 20) - sector.count), to: path)
    }

    /// What the keyboard has sent since the guest was started, as the file of its serial port has it behind the asterisk.
    public static func typed(_ serial: String) -> String {
        let text = String(decoding: ((try? DurableFile.read(serial)) ?? nil) ?? [], as: UTF8.self)
        return text.split(separator: "*", maxSplits: 1, omittingEmptySubsequences: false).dropFirst().joined()
    }
}
