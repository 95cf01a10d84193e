internal import TestSupport
internal import Web

/// What comes from a guest's display, which may be anything, and from a viewer.
enum DisplayFuzz {
    private static let formats: [[UInt8]] = [
        [32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0],
        [16, 16, 0, 1, 0, 31, 0, 63, 0, 31, 11, 5, 0, 0, 0, 0],
        [8, 8, 0, 1, 0, 7, 0, 7, 0, 3, 0, 3, 6, 0, 0, 0],
    ]

    /// A server's messages: where they end does not depend on how they come.
    static func server(_ input: [UInt8]) {
        guard let first = input.first, let format = try? PixelFormat(formats[Int(first) % formats.count]) else {
            return
        }
        let size = RFBRectangle(width: 640, height: 480)
        var whole = RFBServerParser(size: size, format: format)
        var pieces = whole
        var bytes = Array(input.dropFirst())
        var others = bytes
        let isGood = bytes.withUnsafeMutableBytes { (try? whole.parse($0)) != nil }
        let isGoodInPieces = others.withUnsafeMutableBytes { bytes in
            bytes.indices.allSatisfy { index in
                (try? pieces.parse(UnsafeMutableRawBufferPointer(rebasing: bytes[index..<(index + 1)]))) != nil
            }
        }
        precondition(isGood == isGoodInPieces && bytes == others, "pieces are read otherwise than the whole")
        if isGood {
            precondition(whole.isAtBoundary == pieces.isAtBoundary && whole.size == pieces.size, "the ends differ")
        }
        let changes = zip(bytes, input.dropFirst()).count { $0 != $1 }
        precondition(changes <= 1, "more than one byte was changed")
        var handshake = RFBClientHandshake()
        _ = try? handshake.receive(input.dropFirst())
    }

    /// A viewer's handshake and messages: what was understood is sent as it came.
    static func viewer(_ input: [UInt8]) {
        guard let first = input.first else { return }
        var handshake = RFBServerHandshake(first & 1 == 0 ? .none : .certificates)
        _ = try? handshake.receive(input.dropFirst())
        var parser = RFBClientMessage.Parser()
        var again = RFBClientMessage.Parser()
        for start in stride(from: 1, to: input.count, by: Int(first) + 1) {
            parser.append(input[start..<min(start + Int(first) + 1, input.count)])
            while let message = try? parser.next() {
                again.append(message.bytes)
                precondition((try? again.next()) == message, "a message is sent otherwise than it came")
            }
        }
    }
}
