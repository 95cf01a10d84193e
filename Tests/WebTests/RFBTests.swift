import IO
import TestSupport
import Testing

@testable import Web

/// The Remote Framebuffer protocol, byte by byte.
struct RFBTests {
    /// 32 bits, of which 24 are used.
    private static let format: [UInt8] = [32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0]
    /// 16 bits.
    private static let narrow: [UInt8] = [16, 16, 0, 1, 0, 31, 0, 63, 0, 31, 11, 5, 0, 0, 0, 0]

    private static func parser(_ format: [UInt8] = RFBTests.format) throws -> RFBServerParser {
        RFBServerParser(size: RFBRectangle(width: 64, height: 48), format: try PixelFormat(format))
    }

    private static func rectangle(_ encoding: Int32, x: UInt16 = 0, y: UInt16 = 0, _ width: UInt16, _ height: UInt16)
        -> [UInt8]
    {
        x.rfb + y.rfb + width.rfb + height.rfb + encoding.rfb
    }

    private static func update(_ rectangles: [[UInt8]], count: UInt16? = nil) -> [UInt8] {
        [0, 0] + (count ?? UInt16(rectangles.count)).rfb + rectangles.flatMap { $0 }
    }

    /// Parses a stream in pieces of a size, and says where it stood between two messages.
    private static func boundaries(_ stream: inout [UInt8], _ parser: inout RFBServerParser, pieces: Int = 1) throws
        -> [Int]
    {
        var found: [Int] = []
        var at = 0
        while at < stream.count {
            let end = min(at + pieces, stream.count)
            try stream.withUnsafeMutableBytes { bytes in
                try parser.parse(UnsafeMutableRawBufferPointer(rebasing: bytes[at..<end]))
            }
            at = end
            if parser.isAtBoundary { found.append(at) }
        }
        return found
    }

    /// What each message is and how long it is, with the same pixels in two formats.
    @Test(arguments: [format, narrow]) func messagesEndWhereTheyEnd(_ format: [UInt8]) throws {
        let pixel = format[0] == 32 ? 4 : 2
        let tight = format[0] == 32 ? 3 : 2
        func bytes(_ count: Int) -> [UInt8] { [UInt8](repeating: 0xab, count: count) }
        func compact(_ count: Int) -> [UInt8] {
            if count < 128 { return [UInt8(count)] }
            if count < 16384 { return [UInt8(count & 0x7f | 0x80), UInt8(count >> 7)] }
            return [UInt8(count & 0x7f | 0x80), UInt8(count >> 7 & 0x7f | 0x80), UInt8(count >> 14)]
        }
        var hextile: [UInt8] = Self.rectangle(5, 20, 17)
        hextile += [1] + bytes(16 * 16 * pixel)  // raw
        hextile += [2 | 4 | 8] + bytes(2 * pixel) + [3] + bytes(3 * 2)  // 4 pixels wide
        hextile += [8 | 16] + [2] + bytes(2 * (pixel + 2))  // 1 pixel high
        hextile += [0]
        let messages: [[UInt8]] = [
            [2],
            [3, 0, 0, 0, 0, 0, 0, 5] + bytes(5),
            [1, 0, 0, 0, 0, 2] + bytes(12),
            [250, 0, 1, 1],
            [0, 0, 0, 0],
            Self.update([Self.rectangle(0, 3, 2) + bytes(6 * pixel), Self.rectangle(1, 5, 5) + bytes(4)]),
            Self.update([Self.rectangle(0, 0, 7)]),
            Self.update([Self.rectangle(2, 9, 9) + [0, 0, 0, 2] + bytes(pixel + 2 * (pixel + 8))]),
            Self.update([Self.rectangle(4, 9, 9) + [0, 0, 0, 1] + bytes(pixel + pixel + 4)]),
            Self.update([hextile]),
            // Tight: filled, JPEG, copied and compressed, copied and short, a palette of two and of three colours, gradient.
            Self.update([Self.rectangle(7, 9, 9) + [0x80] + bytes(tight)]),
            Self.update([Self.rectangle(7, 9, 9) + [0x90] + compact(20_000) + bytes(20_000)]),
            Self.update([Self.rectangle(7, 9, 9) + [0x10] + compact(200) + bytes(200)]),
            Self.update([Self.rectangle(7, 3, 1) + [0x20] + bytes(3 * tight)]),
            Self.update([Self.rectangle(7, 17, 4) + [0x50, 1, 1] + bytes(2 * tight) + compact(7) + bytes(7)]),
            Self.update([Self.rectangle(7, 17, 3) + [0x50, 1, 1] + bytes(2 * tight) + bytes(9)]),
            Self.update([Self.rectangle(7, 4, 4) + [0x60, 1, 2] + bytes(3 * tight) + compact(9) + bytes(9)]),
            Self.update([Self.rectangle(7, 4, 4) + [0x40, 2] + compact(5) + bytes(5)]),
            Self.update([Self.rectangle(-260, 4, 4) + [0xa0] + compact(129) + bytes(129)]),
            // An update that says itself where it ends.
            Self.update([Self.rectangle(1, 1, 1) + bytes(4), Self.rectangle(-224, 0, 0)], count: .max),
            Self.update([Self.rectangle(-239, 9, 2) + bytes(18 * pixel + 4)]),
            Self.update([Self.rectangle(-240, 9, 2) + bytes(6 + 2 * 4)]),
            Self.update([Self.rectangle(-240, 0, 0)]),
            Self.update([Self.rectangle(-257, 1, 0), Self.rectangle(-258, 0, 0), Self.rectangle(-261, 0, 0) + [1]]),
            Self.update([Self.rectangle(-307, 0, 0) + [0, 0, 0, 3] + bytes(3)]),
            Self.update([Self.rectangle(0x574d_5664, 2, 2) + [0, 0] + bytes(4 * pixel * 2)]),
            Self.update([Self.rectangle(0x574d_5664, 2, 2) + [1, 0] + bytes(16)]),
            Self.update([Self.rectangle(0x574d_5668, 0, 0) + bytes(4)]),
            Self.update([Self.rectangle(-308, 100, 50) + [1, 0, 0, 0] + bytes(16)]),
            Self.update([Self.rectangle(-223, 80, 40)]),
        ]
        let ends = messages.reduce(into: [Int]()) { $0.append(($0.last ?? 0) + $1.count) }
        for pieces in [1, 7, 1 << 20] {
            var parser = try Self.parser(format)
            var stream = messages.flatMap { $0 }
            let found = try Self.boundaries(&stream, &parser, pieces: pieces)
            #expect(found == (pieces == 1 ? ends : ends.filter { $0 % pieces == 0 || $0 == ends.last }))
            #expect(parser.size == RFBRectangle(width: 80, height: 40) && parser.isAtBoundary)
        }
    }

    @Test func theFirstTightRectangleOfAServerResetsAllStreamsAndNoOtherByteChanges() throws {
        var parser = try Self.parser()
        let rectangles = [
            Self.rectangle(-260, 2, 2) + [0x80, 1, 2, 3], Self.rectangle(7, 2, 2) + [0x80, 1, 2, 3],
            Self.rectangle(7, 2, 2) + [0x80, 1, 2, 3],
        ]
        let sent = Self.update(rectangles)
        var stream = sent
        _ = try Self.boundaries(&stream, &parser)
        var expected = sent
        expected[4 + 16 + 12] = 0x8f
        #expect(stream == expected)
    }

    @Test(arguments: [1, 3, 1 << 20])
    func whatAServerSaysInWordsSteersNoTerminal(_ pieces: Int) throws {
        let name = "a\u{1b}]0;b\n\u{9b}c\u{202e}\u{2066}\u{7f}ü"
        let length4: [UInt8] = [0, 0, 0, UInt8(name.utf8.count)]
        let rectangle: [UInt8] = Self.rectangle(-307, 0, 0) + length4 + Array(name.utf8)
        var stream = Self.update([rectangle])
        let length = stream.count
        var parser = try Self.parser()
        _ = try Self.boundaries(&stream, &parser, pieces: pieces)
        let clean = try #require(String(validating: stream.suffix(name.utf8.count), as: UTF8.self))
        #expect(stream.count == length && clean.hasPrefix("a?]0;b?") && clean.hasSuffix("?ü"), "\(clean)")
        #expect(clean == clean.shown(most: 100), "\(clean)")

        let reason = Array("no\u{1b}[2J\n".utf8)
        var refusal = Array("RFB 003.008\n".utf8)
        refusal += [0, 0, 0, 0, UInt8(reason.count)]
        refusal += reason
        var refused = RFBClientHandshake()
        do {
            _ = try refused.receive(refusal)
            Issue.record("it was not refused")
        } catch { #expect("\(error)" == "the server says 'no?[2J?'") }
        var greeting = Array("RFB 003.008\n".utf8)
        greeting += [1, 1, 0, 0, 0, 0, 0, 8, 0, 8]
        greeting += Self.format
        greeting += [0, 0, 0, 3]
        greeting += Array("x\u{1b}\n".utf8)
        var greeted = RFBClientHandshake()
        _ = try greeted.receive(greeting)
        #expect(greeted.outcome?.name == "x??")
    }

    @Test func whatAServerMayNotSayEndsIt() throws {
        let streams: [[UInt8]] = [
            [150], [248], [255], [3, 0, 0, 0, 255, 255, 255, 252], Self.update([Self.rectangle(16, 1, 1)]),
            Self.update([Self.rectangle(6, 1, 1)]), Self.update([Self.rectangle(50, 1, 1)]),
            Self.update([Self.rectangle(7, 9, 9) + [0xa0]]), Self.update([Self.rectangle(7, 9, 9) + [0xf0]]),
            Self.update([Self.rectangle(7, 9, 9) + [0x40, 3]]), Self.update([Self.rectangle(5, 9, 9) + [32]]),
            Self.update([Self.rectangle(0x574d_5664, 2, 2) + [2, 0]]),
        ]
        for var stream in streams {
            var parser = try Self.parser()
            #expect(throws: RFBFailure.self) { _ = try Self.boundaries(&stream, &parser) }
        }
        #expect(throws: RFBFailure.self) { _ = try PixelFormat([24] + Self.format.dropFirst()) }
    }

    @Test func aScreenThatWasNotChangedAsAskedForKeepsItsSize() throws {
        var parser = try Self.parser()
        var stream = Self.update([Self.rectangle(-308, x: 1, y: 3, 100, 50) + [0, 0, 0, 0]])
        _ = try Self.boundaries(&stream, &parser)
        #expect(parser.size == RFBRectangle(width: 64, height: 48))
    }

    // MARK: what viewers say

    private static let said: [RFBClientMessage] = [
        .setEncodings([RFBEncoding(rawValue: 7), RFBEncoding(rawValue: -239)]),
        .updateRequest(isIncremental: true, RFBRectangle(x: 1, y: 2, width: 3, height: 400)),
        .key(isDown: true, symbol: 0xffe1), .extendedKey(isDown: false, symbol: 0x61, code: 30),
        .pointer(buttons: 5, x: 600, y: 7), .cutText(Array("text".utf8)), .cutText([]),
        .setDesktopSize(width: 800, height: 600, screens: [UInt8](repeating: 1, count: 32)),
        .power(version: 1, code: 2),
    ]

    @Test func messagesOfViewersComeAsTheyWereSent() throws {
        let messages = Self.said + [.setPixelFormat(try PixelFormat(Self.narrow))]
        for pieces in [1, 5, 1 << 20] {
            var parser = RFBClientMessage.Parser()
            var found: [RFBClientMessage] = []
            let stream = messages.flatMap(\.bytes)
            for start in stride(from: 0, to: stream.count, by: pieces) {
                parser.append(stream[start..<min(start + pieces, stream.count)])
                while let message = try parser.next() { found.append(message) }
            }
            #expect(found == messages)
        }
        #expect(RFBClientMessage.key(isDown: true, symbol: 0x61).bytes == [4, 1, 0, 0, 0, 0, 0, 0x61])
        #expect(RFBClientMessage.pointer(buttons: 1, x: 258, y: 3).bytes == [5, 1, 1, 2, 0, 3])
        #expect(Self.said.map(\.isInput) == [false, false, true, true, true, true, true, true, true])
    }

    @Test func whatReachesNoDisplayIsLeftOut() throws {
        let key = RFBClientMessage.key(isDown: true, symbol: 1)
        let dropped: [[UInt8]] = [
            [248, 0, 0, 0, 0, 0, 0, 1, 3, 9, 9, 9],  // a fence
            [150, 1, 0, 0, 0, 0, 0, 1, 0, 1],  // continuous updates
            [255, 1, 0, 0], [255, 1, 0, 2, 3, 2, 0, 0, 0xac, 0x44],  // sound
            [6, 0, 0, 0, 255, 255, 255, 252, 1, 2, 3, 4],  // the extended clipboard
            [6, 0, 0, 0] + UInt32(RFBClientMessage.mostText + 1).rfb
                + [UInt8](repeating: 7, count: RFBClientMessage.mostText + 1),
        ]
        for pieces in [1, 1000] {
            var parser = RFBClientMessage.Parser()
            var count = 0
            let stream = dropped.flatMap { $0 + key.bytes }
            for start in stride(from: 0, to: stream.count, by: pieces) {
                parser.append(stream[start..<min(start + pieces, stream.count)])
                while let message = try parser.next() {
                    #expect(message == key)
                    count += 1
                }
            }
            #expect(count == dropped.count)
        }
        for stream: [UInt8] in [[1], [7], [255, 2], [2, 0, 4, 1]] {
            var parser = RFBClientMessage.Parser()
            parser.append(stream + [UInt8](repeating: 0, count: 64))
            #expect(throws: RFBFailure.self) { _ = try parser.next() }
        }
    }

    @Test func encodingsWithAStateThatCannotBeBroughtAlongAreNotRelayed() {
        let relayed: [Int32] = [
            0, 1, 2, 5, 7, -260, -32, -23, -256, -247, -223, -224, -239, -257, -258, -261, -307, -308, -309,
        ]
        let dropped: [Int32] = [
            6, 15, 16, 50, -259, -312, -313, -314, -316, 0x574d_5669, Int32(bitPattern: 0xc0a1_e5ce),
        ]
        for number in relayed { #expect(RFBEncoding(rawValue: number).isRelayed, "\(number)") }
        for number in dropped { #expect(!RFBEncoding(rawValue: number).isRelayed, "\(number)") }
    }

    // MARK: handshakes

    private static func screen(_ name: String = "QEMU") throws -> ServerInit {
        ServerInit(width: 720, height: 400, format: try PixelFormat(format), name: name)
    }

    /// What a server says in each version, and what a viewer answers.
    @Test func aViewerShakesHandsInEachVersion() throws {
        let conversations: [([UInt8], [UInt8])] = [
            (Array("RFB 003.008\n".utf8) + [2, 2, 1] + [0, 0, 0, 0], Array("RFB 003.008\n".utf8) + [1] + [1]),
            (Array("RFB 003.007\n".utf8) + [1, 1], Array("RFB 003.007\n".utf8) + [1] + [1]),
            (Array("RFB 003.003\n".utf8) + [0, 0, 0, 1], Array("RFB 003.003\n".utf8) + [1]),
            (Array("RFB 004.001\n".utf8) + [1, 1] + [0, 0, 0, 0], Array("RFB 003.008\n".utf8) + [1] + [1]),
        ]
        for (says, answers) in conversations {
            for pieces in [1, 100] {
                var handshake = RFBClientHandshake()
                var answer: [UInt8] = []
                let stream = says + (try Self.screen()).bytes + [2]
                for start in stride(from: 0, to: stream.count, by: pieces) {
                    answer += try handshake.receive(stream[start..<min(start + pieces, stream.count)])
                }
                #expect(answer == answers)
                #expect(handshake.outcome == (try Self.screen()))
                #expect(handshake.takeRest() == [2])
            }
        }
    }

    @Test func aServerThatWantsMoreIsRefusedWithAReason() throws {
        func failure(_ stream: [UInt8]) -> String? {
            var handshake = RFBClientHandshake()
            do { _ = try handshake.receive(stream) } catch { return "\(error)" }
            return nil
        }
        let version = Array("RFB 003.008\n".utf8)
        #expect(failure(version + [2, 2, 19])?.contains("a password or TLS of its own") == true)
        #expect(failure(version + [0, 0, 0, 0, 4] + Array("Busy".utf8)) == "the server says 'Busy'")
        #expect(failure(version + [1, 1, 0, 0, 0, 1, 0, 0, 0, 2] + Array("No".utf8)) == "the server says 'No'")
        #expect(failure(Array("SSH-2.0-OpenS".utf8)) == "the server does not speak RFB")
        #expect(failure(version + [1, 1, 0, 0, 0, 0, 0, 1, 0, 1] + Self.format + [255, 255, 255, 255]) != nil)
    }

    @Test func aServerShakesHandsInEachVersion() throws {
        let conversations: [([UInt8], [UInt8])] = [
            (Array("RFB 003.008\n".utf8) + [1, 1], [1, 1] + [0, 0, 0, 0]),
            (Array("RFB 003.889\n".utf8) + [1, 1], [1, 1] + [0, 0, 0, 0]),
            (Array("RFB 003.007\n".utf8) + [1, 1], [1, 1]),
            (Array("RFB 003.003\n".utf8) + [1], [0, 0, 0, 1]),
            (Array("RFB 003.005\n".utf8) + [0], [0, 0, 0, 1]),
        ]
        for (says, answers) in conversations {
            for pieces in [1, 100] {
                var handshake = RFBServerHandshake()
                #expect(handshake.greeting == Array("RFB 003.008\n".utf8))
                var actions: [RFBServerHandshake.Action] = []
                let stream = says + [3]
                for start in stride(from: 0, to: stream.count, by: pieces) {
                    actions += try handshake.receive(stream[start..<min(start + pieces, stream.count)])
                }
                var sent: [UInt8] = []
                for case .send(let bytes) in actions { sent += bytes }
                #expect(sent == answers && actions.last == .finish && handshake.takeRest() == [3])
            }
        }
        var handshake = RFBServerHandshake()
        #expect(throws: RFBFailure.self) { _ = try handshake.receive(Array("RFB 003.008\n".utf8) + [2]) }
    }

    @Test func tlsBeginsInsideAndNothingOfBeforeIsKept() throws {
        let start = Array("RFB 003.008\n".utf8) + [19, 0, 2, 0, 0, 1, 4]
        var handshake = RFBServerHandshake(.certificates)
        let actions = try handshake.receive(start)
        #expect(
            actions == [
                .send([1, 19]), .send([0, 2]), .send([0, 1, 0, 0, 1, 4]), .send([1]), .startTLS,
            ]
        )
        let encrypted = handshake.encrypted()
        #expect(encrypted == [.send([0, 0, 0, 0])])
        let finished = try handshake.receive([1])
        #expect(finished == [.finish])
        var early = RFBServerHandshake(.certificates)
        #expect(throws: RFBFailure.self) { _ = try early.receive(start + [1]) }
        var old = RFBServerHandshake(.certificates)
        #expect(throws: RFBFailure.self) { _ = try old.receive(Array("RFB 003.003\n".utf8)) }
        var plain = RFBServerHandshake(.certificates)
        #expect(throws: RFBFailure.self) { _ = try plain.receive(Array("RFB 003.008\n".utf8) + [1]) }
    }
}
