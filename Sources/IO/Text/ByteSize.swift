/// Numbers of bytes as people and QEMU write them.
public enum ByteSize {
    private static let suffixes: [String: UInt64] = ["b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60]

    /// Reads `512`, `64K`, `1.5G` or `0x1000`: units are powers of 1024, in either case.
    ///
    /// - Parameters:
    ///   - text: the number with its unit.
    ///   - unit: the unit of a number without one, as a suffix: `b` for bytes.
    /// - Returns: the bytes, rounded down; nil for anything else, and for what is too much for 64 bits.
    public static func parse(_ text: String, unit: String = "b") -> UInt64? {
        if text.hasPrefix("0x") || text.hasPrefix("0X") {
            guard let shift = suffixes[unit] else { return nil }
            return UInt64(text.dropFirst(2), radix: 16).flatMap { shifted($0, shift) }
        }
        let digits = text.prefix { ("0"..."9").contains($0) || $0 == "." }
        let suffix = text.dropFirst(digits.count).lowercased()
        guard !digits.isEmpty, let shift = suffixes[suffix.isEmpty ? unit : suffix] else { return nil }
        if let whole = UInt64(digits) { return shifted(whole, shift) }
        guard let number = Double(digits), number >= 0 else { return nil }
        let bytes = number * Double(UInt64(1) << shift)
        return bytes < 0x1p64 ? UInt64(bytes) : nil
    }

    private static func shifted(_ number: UInt64, _ shift: UInt64) -> UInt64? {
        number <= UInt64.max >> shift ? number << shift : nil
    }

    /// A number of bytes in the largest unit in which it is whole: `1536M`.
    public static func text(_ bytes: UInt64) -> String {
        guard bytes > 0 else { return "0" }
        let units = ["", "K", "M", "G", "T", "P", "E"]
        let index = min(bytes.trailingZeroBitCount / 10, units.count - 1)
        return "\(bytes >> UInt64(index * 10))\(units[index])"
    }
}
