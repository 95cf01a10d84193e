internal import CGcrypt
internal import FoundationEssentials
internal import Glibc

/// The opening handshake of a websocket (RFC 6455, section 4): an HTTP request and its answer, as values.
public enum WebSocketHandshake {
    /// How many bytes of HTTP either end may send.
    public static let limit = 8 << 10
    /// The subprotocol that QEMU's VNC server and chardevs speak: bytes in binary messages.
    public static let subprotocol = "binary"
    private static let magic = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

    /// Why a handshake failed, and what to tell the peer.
    public struct Failure: Error, Sendable {
        /// The HTTP status for the peer.
        public let status: Int
        /// The sentence.
        public let reason: String
    }

    struct Head {
        var start: [Substring]
        var fields: [String: String]

        func has(_ field: String, token: String) -> Bool {
            (fields[field] ?? "").split(separator: ",").contains {
                $0.trimmed.lowercased() == token
            }
        }
    }

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
    public static func request(host: String, path: String, key: String) -> [UInt8] {
        Array(
            ("GET \(path) HTTP/1.1\r\nHost: \(host)\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                + "Sec-WebSocket-Key: \(key)\r\nSec-WebSocket-Version: 13\r\n"
                + "Sec-WebSocket-Protocol: \(subprotocol)\r\n\r\n").utf8
        )
    }

    /// Judges a client's request and makes the answer.
    ///
    /// A client that offers subprotocols must offer "binary"; one that offers none speaks bytes anyway.
    ///
    /// - Parameter bytes: the request with its final empty line.
    /// - Throws: `Failure`.
    public static func response(to bytes: [UInt8]) throws -> [UInt8] {
        let head = try parse(bytes)
        guard head.start.count == 3, head.start[2] == "HTTP/1.1" else {
            throw Failure(status: 400, reason: "it is no HTTP/1.1 request")
        }
        guard head.start[0] == "GET" else {
            throw Failure(status: 405, reason: "the method is \(head.start[0]), not GET")
        }
        guard head.start[1].hasPrefix("/") else {
            throw Failure(status: 400, reason: "the path does not begin with a slash")
        }
        guard head.fields["host"] != nil else { throw Failure(status: 400, reason: "there is no Host") }
        guard head.has("upgrade", token: "websocket"), head.has("connection", token: "upgrade") else {
            throw Failure(status: 426, reason: "it does not ask for an upgrade to websocket")
        }
        guard head.fields["sec-websocket-version"] == "13" else {
            throw Failure(status: 426, reason: "it wants another version of websocket than 13")
        }
        guard let key = head.fields["sec-websocket-key"], Data(base64Encoded: key)?.count == 16 else {
            throw Failure(status: 400, reason: "Sec-WebSocket-Key does not have 16 bytes")
        }
        var answer =
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            + "Sec-WebSocket-Accept: \(accept(for: key))\r\n"
        if head.fields["sec-websocket-protocol"] != nil {
            guard head.has("sec-websocket-protocol", token: subprotocol) else {
                throw Failure(status: 400, reason: "it does not offer the subprotocol '\(subprotocol)'")
            }
            answer += "Sec-WebSocket-Protocol: \(subprotocol)\r\n"
        }
        return Array((answer + "\r\n").utf8)
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
    public static func check(response bytes: [UInt8], key: String) throws {
        let head = try parse(bytes)
        guard head.start.count >= 2, head.start[0] == "HTTP/1.1" else {
            throw Failure(status: 0, reason: "the answer is not HTTP/1.1")
        }
        guard head.start[1] == "101" else {
            throw Failure(
                status: 0,
                reason: "the answer is \(head.start.dropFirst().joined(separator: " ").prefix(100))"
            )
        }
        guard head.has("upgrade", token: "websocket"), head.has("connection", token: "upgrade") else {
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

    private static func parse(_ bytes: [UInt8]) throws -> Head {
        guard let text = String(validating: bytes, as: UTF8.self) else {
            throw Failure(status: 400, reason: "it is not text")
        }
        // A CR LF is one character of a Swift string, which splits exactly where HTTP does.
        var lines = text.split(separator: "\r\n", omittingEmptySubsequences: false)
        guard lines.count >= 3, lines.popLast() == "", lines.popLast() == "" else {
            throw Failure(status: 400, reason: "the head does not end")
        }
        let start = lines.removeFirst().split(separator: " ", maxSplits: 2, omittingEmptySubsequences: false)
        var fields: [String: String] = [:]
        for line in lines {
            guard let colon = line.firstIndex(of: ":"), colon != line.startIndex, line.first?.isWhitespace == false
            else {
                throw Failure(status: 400, reason: "a line of the head is no field")
            }
            let name = line[..<colon].lowercased()
            let value = line[line.index(after: colon)...].trimmed
            if let earlier = fields[name] {
                guard name != "sec-websocket-key", name != "sec-websocket-accept", name != "sec-websocket-version"
                else {
                    throw Failure(status: 400, reason: "\(name) comes twice")
                }
                fields[name] = "\(earlier),\(value)"
            } else {
                fields[name] = value
            }
        }
        return Head(start: start, fields: fields)
    }
}

extension Substring {
    fileprivate var trimmed: String {
        var text = self
        while let first = text.first, first == " " || first == "\t" { text.removeFirst() }
        while let last = text.last, last == " " || last == "\t" { text.removeLast() }
        return String(text)
    }
}
