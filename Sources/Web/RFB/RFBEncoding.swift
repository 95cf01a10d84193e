/// A number by which a viewer says what it understands, and an update how a rectangle is written (RFC 6143, section 7.7; the community's
/// rfbproto for those that are no part of it).
package struct RFBEncoding: RawRepresentable, Sendable, Hashable {
    /// The number.
    package let rawValue: Int32
    /// Makes one from its number.
    package init(rawValue: Int32) { self.rawValue = rawValue }
    private init(_ rawValue: Int32) { self.rawValue = rawValue }

    static let raw = RFBEncoding(0)
    static let copyRect = RFBEncoding(1)
    static let rre = RFBEncoding(2)
    static let corre = RFBEncoding(4)
    static let hextile = RFBEncoding(5)
    static let tight = RFBEncoding(7)
    static let tightPNG = RFBEncoding(-260)
    /// The size of the screen is another one.
    static let desktopSize = RFBEncoding(-223)
    /// An update whose number of rectangles nobody knew ends here.
    static let lastRect = RFBEncoding(-224)
    static let cursor = RFBEncoding(-239)
    static let xCursor = RFBEncoding(-240)
    /// QEMU says whether the pointer is relative.
    static let pointerMotion = RFBEncoding(-257)
    /// QEMU takes the codes of keys.
    static let extendedKey = RFBEncoding(-258)
    static let ledState = RFBEncoding(-261)
    static let desktopName = RFBEncoding(-307)
    /// As `desktopSize`, with the screens it is made of.
    static let extendedDesktopSize = RFBEncoding(-308)
    /// Power buttons.
    static let xvp = RFBEncoding(-309)
    static let vmwareCursor = RFBEncoding(0x574d_5664)
    static let vmwareLEDState = RFBEncoding(0x574d_5668)

    /// What a relay knows the length of, and what leaves no state behind that cannot be brought to another server.
    private static let known: Set<RFBEncoding> = [
        .raw, .copyRect, .rre, .corre, .hextile, .tight, .tightPNG, .desktopSize, .lastRect, .cursor, .xCursor,
        .pointerMotion, .extendedKey, .ledState, .desktopName, .extendedDesktopSize, .xvp, .vmwareCursor,
        .vmwareLEDState,
    ]

    /// Whether a viewer's wish for it may reach the guest's display. Not so the streams of ZRLE, Zlib and H.264, which begin once for a
    /// connection; fences, continuous updates and the extended clipboard, whose state two servers would have to share; sound.
    package var isRelayed: Bool {
        // The quality and the compression that are wanted are no rectangles.
        Self.known.contains(self) || (-32 ... -23).contains(rawValue) || (-256 ... -247).contains(rawValue)
    }
}
