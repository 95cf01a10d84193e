/// Where the messages of a server begin and end (RFC 6143, sections 7.6 and 7.7), in a stream that is passed on piece by piece: nothing of a
/// rectangle is kept, however large it is. A value.
///
/// A name of the desktop is cleaned. In the first rectangle in Tight it sets the bits that reset all four of the encoding's zlib streams: the viewer's decoders are then as new as
/// the encoders of this server, whatever another one has sent before.
package struct RFBServerParser: Sendable {
    /// What the bytes are that come next, once there are enough of them.
    private enum Step: Sendable {
        case message
        case endOfMessage
        case update
        case rectangle
        case endOfRectangle
        case colourMap
        case cutText
        case power
        case subrectangles(size: UInt64)
        case tile(Tiles)
        case tileCount(Tiles, size: UInt64)
        case tight(RFBRectangle, mayBePNG: Bool)
        case tightFilter(RFBRectangle)
        case tightPalette(RFBRectangle)
        case tightData(size: UInt64)
        case tightLength(soFar: UInt64, shift: UInt64)
        case screens
        case name
        case vmwareCursor(RFBRectangle)
    }

    /// The tiles of a rectangle in Hextile, 16 pixels wide and high but for the last of a row or column.
    private struct Tiles: Sendable {
        var area: RFBRectangle
        var index = 0
        var columns: Int { (Int(area.width) + 15) / 16 }
        var count: Int { columns * ((Int(area.height) + 15) / 16) }
        /// The pixels of the present one.
        var pixels: UInt64 {
            let (column, row) = (index % columns, index / columns)
            return UInt64(min(16, Int(area.width) - 16 * column)) * UInt64(min(16, Int(area.height) - 16 * row))
        }
        var next: Tiles { Tiles(area: area, index: index + 1) }
    }

    /// The size of the screen, as the viewer knows it from this server.
    package private(set) var size: RFBRectangle
    /// How pixels are written in messages that begin from now on.
    package var format: PixelFormat
    /// That of the present message.
    private var present: PixelFormat
    private var step = Step.message
    /// How many bytes the step takes.
    private var wanted = 1
    private var gathered: [UInt8] = []
    /// How many bytes go by before the step.
    private var passing: UInt64 = 0
    /// The rectangles that are left of the present update; nil when only the last one says so.
    private var rectangles: UInt16?
    private var mustReset = true
    /// What cleans the bytes that go by; nil for those that are no name.
    private var cleaner: NameCleaner?

    /// Makes a parser that begins behind the handshake.
    package init(size: RFBRectangle, format: PixelFormat) {
        (self.size, self.format, present) = (size, format, format)
    }

    /// Whether the stream stands between two messages.
    package var isAtBoundary: Bool {
        if case .message = step { return passing == 0 && gathered.isEmpty }
        return false
    }

    /// Goes through bytes, of which it may change some.
    ///
    /// - Throws: `RFBFailure.violation` for what it does not know: where it ends cannot be said.
    package mutating func parse(_ bytes: UnsafeMutableRawBufferPointer) throws(RFBFailure) {
        var index = 0
        while true {
            if passing > 0 {
                let count = min(passing, UInt64(bytes.count - index))
                cleaner?.clean(UnsafeMutableRawBufferPointer(rebasing: bytes[index..<(index + Int(count))]))
                index += Int(count)
                passing -= count
                if passing > 0 { return }
                cleaner = nil
            }
            while gathered.count < wanted {
                guard index < bytes.count else { return }
                gathered.append(bytes[index])
                index += 1
            }
            if case .tight(_, let mayBePNG) = step, !mayBePNG, mustReset {
                bytes[index - 1] |= 0x0f
                mustReset = false
            }
            let head = gathered
            gathered.removeAll(keepingCapacity: true)
            try advance(head)
        }
    }

    /// Lets bytes go by, and then takes a step of its own length.
    private mutating func go(to step: Step, _ wanted: Int, passing: UInt64 = 0) {
        (self.step, self.wanted, self.passing) = (step, wanted, passing)
    }

    private mutating func pass(_ count: UInt64) { go(to: .endOfRectangle, 0, passing: count) }

    private mutating func advance(_ head: [UInt8]) throws(RFBFailure) {
        var reader = RFBReader(head)
        switch step {
        case .message: try begin(head[0])
        case .endOfMessage: go(to: .message, 1)
        case .update:
            _ = reader.u8()
            let count = reader.u16()
            rectangles = count == .max ? nil : count
            if count == 0 { go(to: .endOfMessage, 0) } else { go(to: .rectangle, 12) }
        case .rectangle: try rectangle(RFBRectangle(head), RFBEncoding(rawValue: RFBReader(head.suffix(4)).first32))
        case .endOfRectangle:
            if let left = rectangles {
                rectangles = left - 1
                if left == 1 { return go(to: .endOfMessage, 0) }
            }
            go(to: .rectangle, 12)
        case .colourMap:
            _ = (reader.u8(), reader.u16())
            go(to: .endOfMessage, 0, passing: 6 * UInt64(reader.u16()))
        case .cutText:
            _ = (reader.u8(), reader.u16())
            let length = reader.s32()
            guard length >= 0 else { throw .violation("a server cuts text as nobody has asked for") }
            go(to: .endOfMessage, 0, passing: UInt64(length))
        case .power: go(to: .endOfMessage, 0)
        case .subrectangles(let size): pass(UInt64(present.bytesPerPixel) + UInt64(reader.u32()) * size)
        case .tile(let tiles): try tile(tiles, head[0])
        case .tileCount(let tiles, let size):
            nextTile(tiles.next, passing: UInt64(head.last ?? 0) * size)
        case .tight(let area, let mayBePNG): try tight(area, head[0] >> 4, mayBePNG: mayBePNG)
        case .tightFilter(let area):
            switch head[0] {
            case 0, 2: go(to: .tightData(size: area.area * UInt64(present.bytesPerTightPixel)), 0)
            case 1: go(to: .tightPalette(area), 1)
            default: throw .violation("Tight has no filter \(head[0])")
            }
        case .tightPalette(let area):
            let colours = UInt64(head[0]) + 1
            go(
                to: .tightData(size: colours <= 2 ? area.bitmap : area.area),
                0,
                passing: colours * UInt64(present.bytesPerTightPixel)
            )
        case .tightData(let size):
            // Less than this is not compressed.
            if size < 12 { pass(size) } else { go(to: .tightLength(soFar: 0, shift: 0), 1) }
        case .tightLength(let soFar, let shift):
            // Seven bits and whether there are more, twice, and then eight.
            let isLast = shift == 14
            let length = soFar | UInt64(isLast ? head[0] : head[0] & 0x7f) << shift
            if !isLast, head[0] & 0x80 != 0 { return go(to: .tightLength(soFar: length, shift: shift + 7), 1) }
            pass(length)
        case .screens: pass(16 * UInt64(head[0]))
        case .name:
            pass(UInt64(reader.u32()))
            cleaner = NameCleaner()
        case .vmwareCursor(let area):
            switch head[0] {
            case 0: pass(area.area * UInt64(present.bytesPerPixel) * 2)
            case 1: pass(area.area * 4)
            default: throw .violation("there is no cursor of kind \(head[0])")
            }
        }
    }

    private mutating func begin(_ type: UInt8) throws(RFBFailure) {
        present = format
        switch type {
        case 0: go(to: .update, 3)
        case 1: go(to: .colourMap, 5)
        case 2: go(to: .endOfMessage, 0)
        case 3: go(to: .cutText, 7)
        case 250: go(to: .power, 3)
        default: throw .violation("there is no message \(type) of a server that was asked for")
        }
    }

    private mutating func rectangle(_ area: RFBRectangle, _ encoding: RFBEncoding) throws(RFBFailure) {
        let pixel = UInt64(present.bytesPerPixel)
        switch encoding {
        case .raw: pass(area.area * pixel)
        case .copyRect: pass(4)
        case .rre: go(to: .subrectangles(size: pixel + 8), 4)
        case .corre: go(to: .subrectangles(size: pixel + 4), 4)
        case .hextile: nextTile(Tiles(area: area), passing: 0)
        case .tight: go(to: .tight(area, mayBePNG: false), 1)
        case .tightPNG: go(to: .tight(area, mayBePNG: true), 1)
        case .desktopName: go(to: .name, 4)
        case .lastRect:
            rectangles = 1
            pass(0)
        case .desktopSize:
            size = RFBRectangle(width: area.width, height: area.height)
            pass(0)
        case .extendedDesktopSize:
            // The answer to a viewer whose wish was not granted.
            if area.x != 1 || area.y == 0 { size = RFBRectangle(width: area.width, height: area.height) }
            go(to: .screens, 4)
        case .cursor: pass(area.area * pixel + area.bitmap)
        case .xCursor: pass(area.area == 0 ? 0 : 6 + 2 * area.bitmap)
        case .pointerMotion, .extendedKey: pass(0)
        case .ledState: pass(1)
        case .vmwareLEDState: pass(4)
        case .vmwareCursor: go(to: .vmwareCursor(area), 2)
        default: throw .violation("a rectangle is in the encoding \(encoding.rawValue), which nobody has asked for")
        }
    }

    private mutating func nextTile(_ tiles: Tiles, passing: UInt64) {
        if tiles.index >= tiles.count { pass(passing) } else { go(to: .tile(tiles), 1, passing: passing) }
    }

    private mutating func tile(_ tiles: Tiles, _ kind: UInt8) throws(RFBFailure) {
        guard kind < 32 else { throw .violation("Hextile has no tiles of kind \(kind)") }
        let pixel = present.bytesPerPixel
        if kind & 1 != 0 { return nextTile(tiles.next, passing: tiles.pixels * UInt64(pixel)) }
        let colours = (kind & 2 != 0 ? pixel : 0) + (kind & 4 != 0 ? pixel : 0)
        guard kind & 8 != 0 else { return nextTile(tiles.next, passing: UInt64(colours)) }
        go(to: .tileCount(tiles, size: UInt64(kind & 16 != 0 ? pixel + 2 : 2)), colours + 1)
    }

    private mutating func tight(_ area: RFBRectangle, _ kind: UInt8, mayBePNG: Bool) throws(RFBFailure) {
        switch kind {
        case 0...3: go(to: .tightData(size: area.area * UInt64(present.bytesPerTightPixel)), 0)
        case 4...7: go(to: .tightFilter(area), 1)
        case 8: pass(UInt64(present.bytesPerTightPixel))
        case 9: go(to: .tightLength(soFar: 0, shift: 0), 1)
        case 10 where mayBePNG: go(to: .tightLength(soFar: 0, shift: 0), 1)
        default: throw .violation("Tight has no rectangles of kind \(kind)")
        }
    }
}

extension RFBReader {
    /// The first four bytes, as a number with a sign.
    fileprivate var first32: Int32 {
        var reader = self
        return reader.s32()
    }
}
