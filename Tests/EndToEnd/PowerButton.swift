import IO

/// A guest of one sector that does what an operating system does when the button of its machine is pressed: it turns itself off.
enum PowerButton {
    /// The machine that it runs on: where its registers are depends on that.
    static func command(disk: String, serial: String) -> [String] {
        [
            "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-display", "none", "-serial",
            "file:\(serial)", "-drive", "file=\(disk),format=raw,if=ide",
        ]
    }

    /// Writes its disk. It says `R` on its serial line when it listens.
    static func write(to path: String) throws {
        var sector: [UInt8] = [
            // The power button's event is enabled (PM1_EN, bit 8), and 'R' goes to the first serial line.
            0xBA, 0x02, 0x06, 0xB8, 0x00, 0x01, 0xEF, 0xBA, 0xF8, 0x03, 0xB0, 0x52, 0xEE,
            // An interrupt, the clock's, is waited for, until the button was pressed (PM1_STS, bit 8).
            0xFB, 0xF4, 0xBA, 0x00, 0x06, 0xED, 0xF6, 0xC4, 0x01, 0x74, 0xF5,
            // Soft off (PM1_CNT, SLP_EN).
            0xBA, 0x04, 0x06, 0xB8, 0x00, 0x20, 0xEF,
            0xF4, 0xEB, 0xFD,
        ]
        sector += [UInt8](repeating: 0, count: 510 - sector.count) + [0x55, 0xAA]
        try DurableFile.write(sector + [UInt8](repeating: 0, count: (1 << 20) - 512), to: path)
    }
}
