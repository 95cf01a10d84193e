internal import CGcrypt
internal import FoundationEssentials

/// The opening handshake of a websocket (RFC 6455, section 4): an HTTP request and its answer, as values.
public enum WebSocketHandshake {
    /// How many bytes of HTTP either end may send.
    public static let limit = 8 << 10
    /// The subprotocol that QEMU's VNC server and chardevs speak: bytes in binary messages.
    public static let subprotocol = "binary"
    private static let magic = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

    /// Why a handshake failed, and what to tell the peer.
    public typealias Failure = HTTPFailure

    /// The value of Sec-WebSocket-Accept for a key (section 4.2.2).
    public static func accept(for key: String) -> String {
        xd_gcry_initialize()
        let input = Array((key + magic).utf8)
        var digest = [UInt8](repeating: 0, count: 20)
        gcry_md_hash_buffer(Int32(GCRY_MD_SHA1.rawValue), &digest, input, input.count)
        return Data(digest).base64EncodedString()
    }

    /// A new random key for a client.
    public static func newKey() -> String {
        var generator = SystemRandomNumberGenerator()
        return Data((0..<16).map { _ in UInt8.random(in: 0...255, using: &generator) }).base64EncodedString()
    }

    /// A client's request.
    ///
    /// - Parameters:
    ///   - host: the server's name, with its port when it is not the usual one.
    ///   - path: the path, which begins with a slash.
    ///   - key: of `newKey()`.
    ///   - fields: further fields: "Origin", "Cookie".
    public static func request(
        host: String,
        path: String,
        key: String,
        fields: KeyValuePairs<String, String> = [:]
    ) -> [UInt8] {
        let more = fields.map { "\($0): \($1)\r\n" }.joined()
        return Array(
            ("GET \(path) HTTP/1.1\r\nHost: \(host)\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                + "Sec-WebSocket-Key: \(key)\r\nSec-WebSocket-Version: 13\r\n"
                + "Sec-WebSocket-Protocol: \(subprotocol)\r\n\(more)\r\n").utf8
        )
    }

    /// Judges a client's request and makes the answer.
    ///
    /// A client that offers subprotocols must offer "binary"; one that offers none speaks bytes anyway.
    ///
    /// - Parameter bytes: the request with its final empty line.
    /// - Throws: `Failure`.
    public static func response(to bytes: [UInt8]) throws(Failure) -> [UInt8] {
        try response(to: HTTPRequestHead(parsing: bytes))
    }

    /// Judges a client's request that somebody has read already, and makes the answer.
    ///
    /// - Throws: `Failure`.
    public static func response(to head: HTTPRequestHead) throws(Failure) -> [UInt8] {
        let fields = head.fields
        guard head.method == "GET" else {
            throw Failure(status: 405, reason: "the method is \(head.method), not GET")
        }
        guard isUpgrade(fields) else {
            throw Failure(status: 426, reason: "it does not ask for an upgrade to websocket")
        }
        guard fields["sec-websocket-version"] == "13" else {
            throw Failure(status: 426, reason: "it wants another version of websocket than 13")
        }
        guard let key = fields["sec-websocket-key"], Data(base64Encoded: key)?.count == 16 else {
            throw Failure(status: 400, reason: "Sec-WebSocket-Key does not have 16 bytes")
        }
        var answer =
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            + "Sec-WebSocket-Accept: \(accept(for: key))\r\n"
        if fields["sec-websocket-protocol"] != nil {
            guard fields.has("sec-websocket-protocol", token: subprotocol) else {
                throw Failure(status: 400, reason: "it does not offer the subprotocol '\(subprotocol)'")
            }
            answer += "Sec-WebSocket-Protocol: \(subprotocol)\r\n"
        }
        return Array((answer + "\r\n").utf8)
    }

    /// Whether a head asks for an upgrade to websocket, or grants it.
    private static func isUpgrade(_ fields: HTTPFields) -> Bool {
        fields.has("upgrade", token: "websocket") && fields.has("connection", token: "upgrade")
    }

    /// What a client that failed is told.
    static func refusal(_ failure: Failure) -> [UInt8] {
        let text = failure.reason + "\n"
        let names = [400: "Bad Request", 405: "Method Not Allowed", 426: "Upgrade Required", 431: "Too Large"]
        return Array(
            ("HTTP/1.1 \(failure.status) \(names[failure.status] ?? "Error")\r\nSec-WebSocket-Version: 13\r\n"
                + "Connection: close\r\nContent-Type: text/plain\r\nContent-Length: \(text.utf8.count)\r\n\r\n\(text)")
                .utf8
        )
    }

    /// Judges a server's answer to the request with `key`.
    ///
    /// - Throws: `Failure`.
    public static func check(response bytes: [UInt8], key: String) throws(Failure) {
        let head = try HTTPResponseHead(parsing: bytes)
        guard head.status == 101 else {
            throw Failure(status: 0, reason: "the answer is \(head.status) \(head.reason)")
        }
        guard isUpgrade(head.fields) else {
            throw Failure(status: 0, reason: "the answer does not upgrade to websocket")
        }
        guard head.fields["sec-websocket-accept"] == accept(for: key) else {
            throw Failure(status: 0, reason: "Sec-WebSocket-Accept does not belong to our key")
        }
        guard head.fields["sec-websocket-extensions"] == nil else {
            throw Failure(status: 0, reason: "it uses an extension that was not asked for")
        }
        if let chosen = head.fields["sec-websocket-protocol"], chosen != subprotocol {
            throw Failure(status: 0, reason: "it chose a subprotocol that was not offered")
        }
    }
}
