/// What texts of another host may look like before they get near a command line of this one.
public enum PeerText {
    /// Whether a text has no control characters: QEMU's arguments end at a zero byte, and lines at their end.
    public static func isPlain(_ text: String) -> Bool {
        text.unicodeScalars.allSatisfy { $0.value >= 0x20 && !(0x7f...0x9f).contains($0.value) && !isLineEnd($0) }
    }

    private static func isLineEnd(_ scalar: Unicode.Scalar) -> Bool { scalar.value == 0x2028 || scalar.value == 0x2029 }

    /// Whether a text is an id as QEMU takes one (`id_wellformed` in its `util/id.c`): a letter, then letters, digits, `-`, `.`, `_`.
    public static func isIdentifier(_ text: String) -> Bool {
        guard let first = text.utf8.first, isLetter(first), text.utf8.count <= 127 else { return false }
        return text.utf8.allSatisfy { isLetter($0) || isDigit($0) || [45, 46, 95].contains($0) }
    }

    /// Whether a text is the key of an option: what an id may be, and nothing that QEMU would end it at.
    static func isKey(_ text: String) -> Bool {
        guard let first = text.utf8.first, isLetter(first) || isDigit(first), text.utf8.count <= 512 else {
            return false
        }
        return text.utf8.allSatisfy { isLetter($0) || isDigit($0) || [45, 46, 95].contains($0) }
    }

    /// Whether a text is a name of a network interface that nothing reads otherwise: letters, digits and `-`, `.`, `_`.
    public static func isInterface(_ text: String) -> Bool {
        (1..<16).contains(text.utf8.count) && text != "." && text != ".."
            && text.utf8.allSatisfy { isLetter($0) || isDigit($0) || [45, 46, 95].contains($0) }
    }

    /// Whether a text is a name or an address of a host, as far as it may stand in front of a colon.
    static func isHost(_ text: Substring) -> Bool {
        text.utf8.count <= 64 && text.utf8.allSatisfy { isLetter($0) || isDigit($0) || [45, 46, 95, 42].contains($0) }
    }

    /// Whether a text is a port's number.
    static func isPort(_ text: Substring) -> Bool {
        !text.isEmpty && text.utf8.count <= 5 && text.utf8.allSatisfy(isDigit) && Int(text).map { $0 < 65536 } == true
    }

    /// Whether a text is one word of letters, digits and `-`, `.`, `_`, `:`, `=`, `,`.
    static func isWord(_ text: String) -> Bool {
        text.utf8.count <= 256
            && text.utf8.allSatisfy { isLetter($0) || isDigit($0) || [45, 46, 95, 58, 61, 44].contains($0) }
    }

    private static func isLetter(_ byte: UInt8) -> Bool { (65...90).contains(byte) || (97...122).contains(byte) }
    private static func isDigit(_ byte: UInt8) -> Bool { (48...57).contains(byte) }
}
