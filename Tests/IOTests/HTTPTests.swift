import IO
import TestSupport
import Testing

/// Heads of HTTP, good and bad.
@Suite(.timeLimit(.minutes(1)))
struct HTTPTests {
    func request(_ text: String) throws -> HTTPRequestHead { try HTTPRequestHead(parsing: Array(text.utf8)) }

    @Test func aRequestIsTakenApart() throws {
        let head = try request(
            "GET /a/b?c=d HTTP/1.1\r\nHost: h:1\r\nAccept: x\r\naccept:\t y \r\nX-Empty:\r\nUpgrade: a, WebSocket\r\n\r\n"
        )
        #expect(head.method == "GET" && head.target == "/a/b?c=d")
        #expect(head.fields["host"] == "h:1" && head.fields["accept"] == "x,y" && head.fields["x-empty"] == "")
        #expect(head.fields["absent"] == nil)
        #expect(head.fields.has("upgrade", token: "websocket") && !head.fields.has("upgrade", token: "web"))
    }

    @Test(arguments: [
        ("GET / HTTP/1.1\r\n\r\n", 400), ("GET / HTTP/1.0\r\nHost: h\r\n\r\n", 505),
        ("GET / HTTP/2.0\r\nHost: h\r\n\r\n", 505),
        ("GET / HTTP/1.1 \r\nHost: h\r\n\r\n", 400), ("GET  / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        ("GET /\r\nHost: h\r\n\r\n", 400), ("GET h HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        ("GET http://h/ HTTP/1.1\r\nHost: h\r\n\r\n", 400), ("OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        ("GET /a#b HTTP/1.1\r\nHost: h\r\n\r\n", 400), ("GET /\u{e4} HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        ("GET /\u{1} HTTP/1.1\r\nHost: h\r\n\r\n", 400), ("G(T / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (" / HTTP/1.1\r\nHost: h\r\n\r\n", 400), ("ABCDEFGHIJKLMNOPQ / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400), ("GET / HTTP/1.1\r\nHost:\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\ncontent-length: 1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: h\r\nCookie: a\r\nCookie: b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: h\r\nOrigin: a\r\nOrigin: b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: h\r\n folded\r\n\r\n", 400), ("GET / HTTP/1.1\r\nHost: h\r\n\tfolded\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost : h\r\n\r\n", 400), ("GET / HTTP/1.1\r\nHost: h\r\n: x\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: h\r\nno field\r\n\r\n", 400), ("GET / HTTP/1.1\r\nHost: h\r\nA B: c\r\n\r\n", 400),
        ("GET / HTTP/1.1\nHost: h\n\n", 400), ("GET / HTTP/1.1\r\nHost: h\nA: b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: h\rA: b\r\n\r\n", 400), ("GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\u{7f}\r\n\r\n", 400), ("GET / HTTP/1.1\r\nHost: h\r\n\r\nGET", 400),
        ("GET / HTTP/1.1\r\nHost: h\r\n\r\n\r\n", 400), ("GET / HTTP/1.1\r\nHost: h\r\n", 400), ("", 400),
        ("\r\n\r\n", 400),
    ])
    func whatTwoProgramsCouldUnderstandInTwoWaysIsRefused(_ text: String, _ status: Int) {
        let failure = #expect(throws: HTTPFailure.self, "\(text)") { try request(text) }
        #expect(failure?.status == status, "\(text): \(String(describing: failure))")
    }

    @Test func bytesThatAreNoTextAreRefused() {
        let bytes = Array("GET / HTTP/1.1\r\nHost: ".utf8) + [0xff, 0xfe] + Array("\r\n\r\n".utf8)
        #expect(throws: HTTPFailure.self) { try HTTPRequestHead(parsing: bytes) }
    }

    @Test func aHeadIsBounded() throws {
        let most = (0..<99).map { "X-\($0): y\r\n" }.joined()
        _ = try request("GET / HTTP/1.1\r\nHost: h\r\n\(most)\r\n")
        let many = #expect(throws: HTTPFailure.self) { try request("GET / HTTP/1.1\r\nHost: h\r\n\(most)X: y\r\n\r\n") }
        #expect(many?.status == 431)
        let text = String(repeating: "y", count: HTTPFields.headLimit)
        let long = #expect(throws: HTTPFailure.self) { try request("GET / HTTP/1.1\r\nHost: h\r\nX: \(text)\r\n\r\n") }
        #expect(long?.status == 431)
    }

    @Test func theEndOfAHeadIsFoundWhereverItWasCut() {
        let bytes = Array("GET / HTTP/1.1\r\nHost: h\r\n\r\nbody\r\n\r\n".utf8)
        for count in 0...bytes.count {
            for start in 0...count {
                let end = bytes[..<count].withUnsafeBytes { HTTPFields.endOfHead(in: $0, from: min(start, 26)) }
                #expect(end == (count >= 27 ? 27 : nil))
            }
        }
    }

    @Test(arguments: [
        ("HTTP/1.1 101 Switching Protocols", 101), ("HTTP/1.1 204 ", 204), ("HTTP/1.1 200", 200),
    ])
    func anAnswerIsTakenApart(_ line: String, _ status: Int) throws {
        let head = try HTTPResponseHead(parsing: Array("\(line)\r\nServer: QEMU VNC\r\n\r\n".utf8))
        #expect(head.status == status && head.fields["server"] == "QEMU VNC")
    }

    @Test(arguments: [
        "HTTP/1.0 200 OK", "HTTP/2 200 OK", "HTTP/1.1 20 OK", "HTTP/1.1 2000 OK", "HTTP/1.1 +20 OK", "HTTP/1.1 999 OK",
    ])
    func anAnswerThatIsNoneIsRefused(_ line: String) {
        #expect(throws: HTTPFailure.self) { try HTTPResponseHead(parsing: Array("\(line)\r\n\r\n".utf8)) }
    }
}
