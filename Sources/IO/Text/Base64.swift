internal import FoundationEssentials

/// Base64 as QEMU reads it: the standard alphabet, with line breaks allowed anywhere.
public enum Base64 {
    /// The text of some bytes, with padding and without line breaks.
    public static func encode(_ bytes: some Sequence<UInt8>) -> String { Data(bytes).base64EncodedString() }

    /// The bytes of a text, or nil when it is not Base64.
    ///
    /// Line breaks are skipped, as `openssl enc -a` and `base64` write them. All the work is done on the caller's bytes and
    /// on the result, so that a secret leaves no other trace in memory.
    public static func decode(_ text: some Sequence<UInt8>) -> [UInt8]? {
        var result: [UInt8] = []
        // Growing would leave parts of a secret behind.
        result.reserveCapacity(text.underestimatedCount / 4 * 3 + 3)
        var bits: UInt32 = 0
        var symbols = 0
        var padding = 0
        for character in text {
            let value: UInt8
            switch character {
            case UInt8(ascii: "A")...UInt8(ascii: "Z"): value = character - UInt8(ascii: "A")
            case UInt8(ascii: "a")...UInt8(ascii: "z"): value = character - UInt8(ascii: "a") + 26
            case UInt8(ascii: "0")...UInt8(ascii: "9"): value = character - UInt8(ascii: "0") + 52
            case UInt8(ascii: "+"): value = 62
            case UInt8(ascii: "/"): value = 63
            case UInt8(ascii: "\n"), UInt8(ascii: "\r"): continue
            case UInt8(ascii: "="):
                padding += 1
                if symbols % 4 < 2 || symbols % 4 + padding > 4 { return nil }
                continue
            default: return nil
            }
            if padding > 0 { return nil }
            bits = bits << 6 | UInt32(value)
            symbols += 1
            if symbols % 4 == 0 {
                result.append(UInt8(truncatingIfNeeded: bits >> 16))
                result.append(UInt8(truncatingIfNeeded: bits >> 8))
                result.append(UInt8(truncatingIfNeeded: bits))
            }
        }
        switch symbols % 4 {
        case 0: return padding == 0 ? result : nil
        case 2:
            guard padding == 2 else { return nil }
            result.append(UInt8(truncatingIfNeeded: bits >> 4))
            return result
        case 3:
            guard padding == 1 else { return nil }
            result.append(UInt8(truncatingIfNeeded: bits >> 10))
            result.append(UInt8(truncatingIfNeeded: bits >> 2))
            return result
        default: return nil
        }
    }
}
