/// What a viewer says after the handshake (RFC 6143, section 7.5), as far as it reaches the guest's display.
package enum RFBClientMessage: Sendable, Hashable {
    /// How pixels are to be written.
    case setPixelFormat(PixelFormat)
    /// What the viewer understands, the best first; at most `mostEncodings`.
    case setEncodings([RFBEncoding])
    /// The viewer wants to see a part of the screen: all of it, or what has changed there.
    case updateRequest(isIncremental: Bool, RFBRectangle)
    /// A key, by the number of X11's symbol.
    case key(isDown: Bool, symbol: UInt32)
    /// A key, by the symbol and the code of an XT keyboard (QEMU's extension).
    case extendedKey(isDown: Bool, symbol: UInt32, code: UInt32)
    /// Where the pointer is, and which of its buttons are down.
    case pointer(buttons: UInt8, x: UInt16, y: UInt16)
    /// What the viewer's user has cut, in Latin-1; at most `mostText` bytes.
    case cutText([UInt8])
    /// The viewer wants the screen to have another size, made of these screens of 16 bytes each.
    case setDesktopSize(width: UInt16, height: UInt16, screens: [UInt8])
    /// A power button: version and code of the xvp extension.
    case power(version: UInt8, code: UInt8)

    /// The most encodings that a viewer may name.
    package static let mostEncodings = 1024
    /// The most bytes of a text; a longer one is left out.
    package static let mostText = 256 << 10

    /// Whether it does something in the guest: what who only looks may not.
    package var isInput: Bool {
        switch self {
        case .setPixelFormat, .setEncodings, .updateRequest: false
        case .key, .extendedKey, .pointer, .cutText, .setDesktopSize, .power: true
        }
    }

    /// As it is sent.
    package var bytes: [UInt8] {
        switch self {
        case .setPixelFormat(let format): [0, 0, 0, 0] + format.bytes
        case .setEncodings(let encodings):
            [2, 0] + UInt16(clamping: encodings.count).rfb + encodings.prefix(Int(UInt16.max)).flatMap(\.rawValue.rfb)
        case .updateRequest(let isIncremental, let area): [3, isIncremental ? 1 : 0] + area.bytes
        case .key(let isDown, let symbol): [4, isDown ? 1 : 0, 0, 0] + symbol.rfb
        case .extendedKey(let isDown, let symbol, let code): [255, 0, 0, isDown ? 1 : 0] + symbol.rfb + code.rfb
        case .pointer(let buttons, let x, let y): [5, buttons] + x.rfb + y.rfb
        case .cutText(let text): [6, 0, 0, 0] + UInt32(clamping: text.count).rfb + text
        case .setDesktopSize(let width, let height, let screens):
            [251, 0] + width.rfb + height.rfb + [UInt8(clamping: screens.count / 16), 0] + screens
        case .power(let version, let code): [250, 0, version, code]
        }
    }

    /// What a viewer's stream brings after the handshake. A value. It holds one message at most.
    package struct Parser: Sendable {
        private var queued: [UInt8] = []
        private var taken = 0
        /// Bytes of a message that nobody wants.
        private var skipped: UInt64 = 0

        /// Makes a parser at the beginning of the messages.
        package init() {}

        /// Adds what has come.
        package mutating func append(_ bytes: some Collection<UInt8>) {
            if taken > 0 {
                queued.removeFirst(taken)
                taken = 0
            }
            queued.append(contentsOf: bytes)
        }

        /// The next whole message; nil when more has to come first. Those that reach no display are left out.
        package mutating func next() throws(RFBFailure) -> RFBClientMessage? {
            while true {
                if skipped > 0 {
                    let count = min(skipped, UInt64(queued.count - taken))
                    taken += Int(count)
                    skipped -= count
                    if skipped > 0 { return nil }
                }
                guard let type = queued[taken...].first else { return nil }
                guard let head = try headLength(type), queued.count - taken >= head else { return nil }
                let start = queued[taken..<(taken + head)]
                if let message = try message(type, start) { return message }
                // It has an end that has not come yet.
                if skipped == 0 { return nil }
            }
        }

        /// The length of what has to be there before a message's own length is known.
        private func headLength(_ type: UInt8) throws(RFBFailure) -> Int? {
            switch type {
            case 0: return 20
            case 2, 250: return 4
            case 3, 150: return 10
            case 4, 6, 251: return 8
            case 5: return 6
            case 248: return 9
            case 255:
                guard queued.count - taken >= 2 else { return nil }
                switch queued[taken + 1] {
                case 0: return 12
                case 1: return 4
                default: throw .violation("there is no message 255 of kind \(queued[taken + 1])")
                }
            default: throw .violation("there is no message \(type) of a viewer")
            }
        }

        /// The message; nil for one that is skipped, and for one whose end has not come yet.
        private mutating func message(
            _ type: UInt8,
            _ head: ArraySlice<UInt8>
        ) throws(RFBFailure) -> RFBClientMessage? {
            var reader = RFBReader(head)
            _ = reader.u8()
            switch type {
            case 0:
                taken += head.count
                return .setPixelFormat(try PixelFormat(head.dropFirst(4)))
            case 2:
                _ = reader.u8()
                let count = Int(reader.u16())
                guard count <= RFBClientMessage.mostEncodings else {
                    throw .violation("a viewer has \(count) encodings")
                }
                guard let body = take(head.count, 4 * count) else { return nil }
                var numbers = RFBReader(body)
                return .setEncodings((0..<count).map { _ in RFBEncoding(rawValue: numbers.s32()) })
            case 3:
                taken += head.count
                return .updateRequest(isIncremental: reader.u8() != 0, RFBRectangle(head.dropFirst(2)))
            case 4:
                taken += head.count
                let isDown = reader.u8() != 0
                _ = reader.u16()
                return .key(isDown: isDown, symbol: reader.u32())
            case 5:
                taken += head.count
                return .pointer(buttons: reader.u8(), x: reader.u16(), y: reader.u16())
            case 6:
                _ = (reader.u8(), reader.u16())
                // A negative length is that of the extended clipboard, which nobody has offered.
                let length = reader.s32()
                guard (0...Int32(RFBClientMessage.mostText)).contains(length) else {
                    skipped = UInt64(head.count) + UInt64(length.magnitude)
                    return nil
                }
                return take(head.count, Int(length)).map { .cutText($0) }
            case 250:
                taken += head.count
                _ = reader.u8()
                return .power(version: reader.u8(), code: reader.u8())
            case 251:
                _ = reader.u8()
                let (width, height) = (reader.u16(), reader.u16())
                let count = Int(reader.u8())
                return take(head.count, 16 * count).map { .setDesktopSize(width: width, height: height, screens: $0) }
            case 255 where head.count == 12:
                taken += head.count
                _ = reader.u8()
                return .extendedKey(isDown: reader.u16() != 0, symbol: reader.u32(), code: reader.u32())
            case 248: skipped = UInt64(head.count) + UInt64(head.last ?? 0)
            case 255:
                _ = reader.u8()
                // The format of sound has six bytes more.
                skipped = UInt64(head.count) + (reader.u16() == 2 ? 6 : 0)
            default: skipped = UInt64(head.count)
            }
            return nil
        }

        /// Takes a whole message, whose body it returns; nil when the body has not come yet.
        private mutating func take(_ head: Int, _ body: Int) -> [UInt8]? {
            guard queued.count - taken >= head + body else { return nil }
            defer { taken += head + body }
            return Array(queued[(taken + head)..<(taken + head + body)])
        }
    }
}
