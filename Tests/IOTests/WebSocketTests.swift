import Glibc
import IO
import TestSupport
import Testing

@Suite(.timeLimit(.minutes(2)))
struct WebSocketTests {
    // MARK: Frames

    func parse(_ bytes: [UInt8], masked: Bool) -> WebSocketFrameHead.Parsed {
        bytes.withUnsafeBytes { WebSocketFrameHead.parse($0, masked: masked) }
    }

    /// The examples of RFC 6455, section 5.7.
    @Test func theExamplesOfTheRFCAreParsed() {
        #expect(
            parse([0x81, 0x05, 0x48, 0x65, 0x6c, 0x6c, 0x6f], masked: false)
                == .head(.init(isFinal: true, opcode: .text, mask: nil, length: 5), size: 2)
        )
        #expect(
            parse([0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f], masked: true)
                == .head(.init(isFinal: true, opcode: .text, mask: 0x3d21_fa37, length: 5), size: 6)
        )
        #expect(
            parse([0x01, 0x03], masked: false)
                == .head(.init(isFinal: false, opcode: .text, mask: nil, length: 3), size: 2)
        )
        #expect(
            parse([0x82, 0x7e, 0x01, 0x00], masked: false)
                == .head(.init(isFinal: true, opcode: .binary, mask: nil, length: 256), size: 4)
        )
        #expect(
            parse([0x82, 0x7f, 0, 0, 0, 0, 0, 1, 0, 0], masked: false)
                == .head(.init(isFinal: true, opcode: .binary, mask: nil, length: 65536), size: 10)
        )
    }

    @Test(arguments: [0, 1, 125, 126, 65535, 65536, 1 << 40] as [UInt64])
    func headsRoundTripAndEveryPrefixIsIncomplete(_ length: UInt64) {
        for mask in [nil, 0x0102_0304] as [UInt32?] {
            let head = WebSocketFrameHead(isFinal: true, opcode: .binary, mask: mask, length: length)
            var bytes = [UInt8](repeating: 0, count: 14)
            let size = bytes.withUnsafeMutableBytes { head.write(to: $0) }
            #expect(parse(Array(bytes[..<size]), masked: mask != nil) == .head(head, size: size))
            for count in 0..<size { #expect(parse(Array(bytes[..<count]), masked: mask != nil) == .incomplete) }
        }
    }

    @Test(
        arguments: [
            ([0xc2, 0x00], "reserved bit"), ([0x83, 0x00], "opcode 3"), ([0x82, 0x80, 0, 0, 0, 0], "is masked"),
            ([0x09, 0x00], "control frame is fragmented"), ([0x89, 0x7e, 0, 126], "longer than 125"),
            ([0x82, 0x7e, 0, 125], "shortest form"), ([0x82, 0x7f, 0, 0, 0, 0, 0, 0, 0xff, 0xff], "shortest form"),
            ([0x82, 0x7f, 0x80, 0, 0, 0, 0, 0, 0, 0], "highest bit"),
        ] as [([UInt8], String)]
    )
    func whatTheRFCForbidsIsAViolation(_ bytes: [UInt8], _ reason: String) {
        guard case .violation(let words) = parse(bytes, masked: false) else {
            Issue.record("it was accepted")
            return
        }
        #expect(words.contains(reason))
        guard case .violation = parse([0x82, 0x00], masked: true) else {
            Issue.record("an unmasked frame of a client was accepted")
            return
        }
    }

    @Test func aMaskIsAppliedAtAnyOffset() {
        let mask: UInt32 = 0x4433_2211
        for length in 0..<40 {
            for offset in 0..<4 {
                var bytes = (0..<length).map { UInt8($0) }
                bytes.withUnsafeMutableBytes { WebSocketFrameHead.apply(mask, to: $0, offset: offset) }
                let key: [UInt8] = [0x11, 0x22, 0x33, 0x44]
                #expect(bytes == (0..<length).map { UInt8($0) ^ key[($0 + offset) & 3] })
            }
        }
    }

    // MARK: Handshake

    /// The example of RFC 6455, section 1.3.
    @Test func theAcceptValueIsTheRFCs() {
        #expect(WebSocketHandshake.accept(for: "dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
    }

    static let good = [
        "GET / HTTP/1.1", "Host: h", "Upgrade: WebSocket", "Connection: keep-alive, Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Protocol: chat, binary",
    ]

    func respond(_ lines: [String]) throws -> String {
        let request = Array((lines.joined(separator: "\r\n") + "\r\n\r\n").utf8)
        return String(decoding: try WebSocketHandshake.response(to: request), as: UTF8.self)
    }

    @Test func aRequestIsAnsweredWithTheSubprotocol() throws {
        let answer = try respond(Self.good)
        #expect(answer.hasPrefix("HTTP/1.1 101 "))
        #expect(answer.contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"))
        #expect(answer.contains("Sec-WebSocket-Protocol: binary\r\n"))
        #expect(!(try respond(Array(Self.good.dropLast()))).contains("Sec-WebSocket-Protocol"))
    }

    @Test(arguments: [
        (0, "POST / HTTP/1.1", 405), (0, "GET / HTTP/1.0", 505), (0, "GET http://h/ HTTP/1.1", 400), (1, "X: y", 400),
        (2, "Upgrade: h2c", 426), (3, "Connection: close", 426), (4, "Sec-WebSocket-Key: AAAA", 400), (4, "X: y", 400),
        (5, "Sec-WebSocket-Version: 8", 426), (6, "Sec-WebSocket-Protocol: chat", 400), (1, "Host", 400),
        (1, " Host: folded", 400), (0, "", 400), (0, "GET /", 400),
        (6, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", 400),
    ])
    func aBadRequestIsRefusedWithAStatus(_ index: Int, _ line: String, _ status: Int) {
        var lines = Self.good
        lines[index] = line
        let failure = #expect(throws: WebSocketHandshake.Failure.self) { try respond(lines) }
        #expect(failure?.status == status)
    }

    @Test func aClientRefusesAnswersThatAreNotForIt() throws {
        let key = "dGhlIHNhbXBsZSBub25jZQ=="
        let answer = try respond(Self.good)
        try WebSocketHandshake.check(response: Array(answer.utf8), key: key)
        for (from, to) in [
            ("101", "200"), ("s3pP", "t3pP"), ("Upgrade: websocket", "Upgrade: x"), ("Connection: Upgrade", "X: y"),
            ("Protocol: binary", "Protocol: other"), ("\r\n\r\n", "\r\nSec-WebSocket-Extensions: x\r\n\r\n"),
            ("HTTP/1.1", "HTTP/2"),
        ] {
            let bad = answer.replacing(from, with: to)
            #expect(throws: WebSocketHandshake.Failure.self, "\(from)") {
                try WebSocketHandshake.check(response: Array(bad.utf8), key: key)
            }
        }
    }

    /// A server that opens no websocket says why in the body.
    @Test(arguments: [
        (
            "application/json", #"{"error":"The guest does not run; \u001b[2J'start' it"}"#,
            "The guest does not run; ?[2J'start' it"
        ),
        ("text/plain; charset=utf-8", "busy\n", "busy"), ("text/html", "<p>busy", nil),
        ("application/json", "[1]", nil),
    ])
    func aRefusedClientHasTheServersWords(_ type: String, _ body: String, _ sentence: String?) async throws {
        try await onLoop { loop in
            let (a, b) = MemoryChannel.pair(on: loop)
            let head = "HTTP/1.1 409 Conflict\r\nContent-Type: \(type)\r\nContent-Length: \(body.utf8.count)\r\n\r\n"
            // The body comes by itself, and the connection stays open behind it.
            try await b.write(Array(head.utf8))
            let later = Task(executorPreference: loop) { try await b.write(Array(body.utf8)) }
            do {
                _ = try await WebSocketChannel.connect(over: a, host: "h")
                Issue.record("it was opened")
            } catch let refusal as HTTPRefusal {
                #expect(refusal.status == 409 && refusal.sentence == sentence)
                #expect("\(refusal)" == sentence ?? "the answer is 409 Conflict")
            }
            try await later.value
        }
    }

    @Test func aReasonForTheEndIsCutBetweenWords() async throws {
        try await onLoop { loop in
            let (a, b) = MemoryChannel.pair(on: loop)
            async let accepted = WebSocketChannel.accept(over: b)
            let client = try await WebSocketChannel.connect(over: a, host: "h")
            let server = try await accepted
            let reason = String(repeating: "größer ", count: 30) + "'this' mends it"
            try await server.finishWriting(code: 4000, reason: reason)
            await #expect(throws: ChannelError.self) { _ = try await client.read(exactly: 1) }
            #expect(client.peerCloseReason.hasSuffix("größer...") && client.peerCloseReason.utf8.count <= 123)
        }
    }

    @Test func anEndlessOrSlowHandshakeIsDropped() async throws {
        try await onLoop { loop in
            let (a, b) = MemoryChannel.pair(on: loop)
            let accepting = Task(executorPreference: loop) { try await WebSocketChannel.accept(over: b) }
            try await a.write(Array("GET / HTTP/1.1\r\n".utf8))
            for _ in 0..<10 { try? await a.write(Array(("X: " + String(repeating: "y", count: 1000) + "\r\n").utf8)) }
            let error = await #expect(throws: ChannelError.self) { try await accepting.value }
            #expect(error?.message.contains("longer than") == true)
            let (_, d) = MemoryChannel.pair(on: loop)
            let slow = await #expect(throws: ChannelError.self) {
                try await WebSocketChannel.accept(over: d, timeout: .milliseconds(30))
            }
            #expect(slow?.code == .timedOut)
        }
    }

    // MARK: Raw frames against the server

    /// A server's channel and the raw end of its client.
    func server(_ loop: EventLoop) async throws -> (raw: MemoryChannel, channel: WebSocketChannel) {
        let (a, b) = MemoryChannel.pair(on: loop)
        async let accepted = WebSocketChannel.accept(over: b)
        try await a.write(Array((Self.good.joined(separator: "\r\n") + "\r\n\r\n").utf8))
        let channel = try await accepted
        _ = try await a.read(exactly: try respond(Self.good).utf8.count)
        return (a, channel)
    }

    func frame(_ first: UInt8, _ payload: [UInt8], mask: [UInt8] = [1, 2, 3, 4]) -> [UInt8] {
        precondition(payload.count <= 125, "short frames only")
        return [first, 0x80 | UInt8(payload.count)] + mask + payload.enumerated().map { $1 ^ mask[$0 & 3] }
    }

    @Test func controlFramesBetweenFragmentsAreAnsweredAndTheMessageIsWhole() async throws {
        try await onLoop { loop in
            let (raw, channel) = try await self.server(loop)
            try await raw.write(
                self.frame(0x02, [1, 2]) + self.frame(0x89, Array("are you there".utf8)) + self.frame(0x00, [])
                    + self.frame(0x8a, []) + self.frame(0x80, [3])
            )
            #expect(try await channel.read(exactly: 3) == [1, 2, 3])
            #expect(try await raw.read(exactly: 15) == [0x8a, 13] + Array("are you there".utf8))
        }
    }

    @Test(
        arguments: [
            ([0x80], [], 1002), ([0x81], Array("text".utf8), 1003), ([0x02, 0x82], [1], 1002), ([0x83], [], 1002),
            ([0xc2], [], 1002), ([0x88], [3], 1002), ([0x88], [0x03, 0xec], 1002),
            ([0x88], [0x03, 0xe8, 0xff, 0xfe], 1002),
            ([0x88], [0x00, 0x00], 1002),
        ] as [([UInt8], [UInt8], Int)]
    )
    func brokenRulesCloseWithTheRightCode(_ firsts: [UInt8], _ payload: [UInt8], _ code: Int) async throws {
        try await onLoop { loop in
            let (raw, channel) = try await self.server(loop)
            try await raw.write(firsts.flatMap { self.frame($0, payload) })
            let error = await #expect(throws: ChannelError.self) {
                // Legal pieces before the violation are delivered.
                while !(try await channel.read(exactly: 1)).isEmpty {}
            }
            #expect(error?.code == .protocolViolation)
            #expect(try await raw.read(exactly: 4) == [0x88, 2, UInt8(code >> 8), UInt8(code & 0xff)])
            await #expect(throws: ChannelError.self) { try await channel.write([1]) }
        }
    }

    @Test func closeCodesAndReasonsAreTold() async throws {
        try await onLoop { loop in
            let (raw, channel) = try await self.server(loop)
            try await raw.write(self.frame(0x88, [0x03, 0xf3] + Array("disk full".utf8)))
            let error = await #expect(throws: ChannelError.self) { try await channel.read(exactly: 1) }
            #expect(error?.message.contains("with code 1011 ('disk full')") == true)
            let (other, quiet) = try await self.server(loop)
            try await other.write(self.frame(0x88, []))
            let buffer = IOBuffer(capacity: 1)
            #expect(try await quiet.readSome(into: buffer.mutable(0..<1)) == 0)
            try await quiet.finishWriting()
            #expect(try await other.read(exactly: 4) == [0x88, 2, 0x03, 0xe8])
        }
    }

    @Test func anEndWithoutACloseFrameIsTruncation() async throws {
        try await onLoop { loop in
            let (raw, channel) = try await self.server(loop)
            try await raw.finishWriting()
            let error = await #expect(throws: ChannelError.self) { try await channel.read(exactly: 1) }
            #expect(error?.code == .truncated)
        }
    }

    @Test func whatCameBeforeAViolationIsDeliveredFirst() async throws {
        try await onLoop { loop in
            let (raw, channel) = try await self.server(loop)
            try await raw.write(self.frame(0x82, [1, 2, 3]) + self.frame(0x83, []))
            let buffer = IOBuffer(capacity: 16)
            #expect(try await channel.readSome(into: buffer.mutable(0..<16)) == 3)
            await #expect(throws: ChannelError.self) { try await channel.readSome(into: buffer.mutable(0..<16)) }
        }
    }

    @Test func aFloodOfEmptyFramesLeavesTheLoopToOthers() async throws {
        try await onLoop { loop in
            let (a, b) = MemoryChannel.pair(on: loop, capacity: 16 << 20)
            async let accepted = WebSocketChannel.accept(over: b)
            try await a.write(Array((Self.good.joined(separator: "\r\n") + "\r\n\r\n").utf8))
            let channel = try await accepted
            let empty = [UInt8]([[UInt8]](repeating: self.frame(0x82, []), count: 200_000).joined())
            try await a.write(empty + self.frame(0x82, [9]))
            // One read does not go through all of it.
            #expect(try channel.readNow(into: IOBuffer(capacity: 1).mutable(0..<1)) == nil)
            #expect(try await channel.read(exactly: 1) == [9])
        }
    }

    @Test func aFloodOfPingsByAPeerThatDoesNotReadIsBounded() async throws {
        try await onLoop { loop in
            let (a, b) = MemoryChannel.pair(on: loop, capacity: 4096)
            async let accepted = WebSocketChannel.accept(over: b)
            try await a.write(Array((Self.good.joined(separator: "\r\n") + "\r\n\r\n").utf8))
            let channel = try await accepted
            let reading = Task(executorPreference: loop) { try await channel.read(exactly: 1) }
            let ping = self.frame(0x89, [UInt8](repeating: 7, count: 125))
            for _ in 0..<5000 { try await a.write(ping) }
            try await a.write(self.frame(0x82, [9]))
            #expect(try await reading.value == [9])
        }
    }

    @Test func aFrameOfAnyLengthIsStreamedWithoutBeingGathered() async throws {
        try await onLoop { loop in
            let (raw, channel) = try await self.server(loop)
            // 2^40 bytes are announced; what comes is delivered as it comes.
            try await raw.write([0x82, 0xff, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0])
            for round in 0..<20 {
                try await raw.write([UInt8](repeating: UInt8(round), count: 10000))
                #expect(try await channel.read(exactly: 10000) == [UInt8](repeating: UInt8(round), count: 10000))
            }
        }
    }
}
