internal import Glibc
internal import IO

/// The requests of one connection, one after the other, and their answers (RFC 9112).
///
/// Confined to the channel's loop.
final class HTTPConnection: @unchecked Sendable {
    // Unchecked: confined to the channel's loop.

    /// The channel.
    let channel: any Channel
    /// What was read and belongs to no request yet.
    private(set) var rest: [UInt8] = []
    private let buffer = IOBuffer(capacity: 16 << 10)
    private var isFirst = true
    private let patience: Patience

    /// How long a client may take.
    struct Patience: Sendable {
        /// For a request's head from its first byte, for its body from there, and for the first byte of the first one.
        var request = WebLimits.request
        /// For the first byte of another request.
        var idle = WebLimits.idle
        /// For taking an answer.
        var answer = WebLimits.answer
    }

    init(_ channel: any Channel, _ patience: Patience = Patience()) {
        self.channel = channel
        self.patience = patience
    }

    /// The next request with its body; nil when the client has ended the connection, or says nothing.
    ///
    /// - Throws: `HTTPFailure` for a request that is answered with its status, after which nothing can be read any more; `ChannelError` for
    ///   a connection that is lost.
    func next() async throws -> HTTPRequest? {
        if rest.isEmpty {
            do {
                let more = try await channel.withDeadline(
                    isFirst ? patience.request : patience.idle,
                    for: "A request"
                ) {
                    try await fill()
                }
                guard more else { return nil }
            } catch let error as ChannelError where error.code == .timedOut { return nil }
        }
        isFirst = false
        let head = try await channel.withDeadline(patience.request, for: "A request's head") { try await readHead() }
        var request = try HTTPRequest(try HTTPRequestHead(parsing: head))
        request.body = try await body(of: request.head)
        return request
    }

    private func fill() async throws -> Bool {
        let count = try await channel.readSome(into: buffer.mutable(0..<buffer.capacity))
        rest.append(contentsOf: buffer.bytes(0..<count))
        return count > 0
    }

    private func readHead() async throws -> [UInt8] {
        var scanned = 0
        while true {
            if let end = rest.withUnsafeBytes({ HTTPFields.endOfHead(in: $0, from: scanned) }) {
                guard end <= HTTPFields.headLimit else { throw Self.tooLong }
                defer { rest.removeFirst(end) }
                return Array(rest[..<end])
            }
            scanned = rest.count
            guard scanned <= HTTPFields.headLimit else { throw Self.tooLong }
            guard try await fill() else {
                throw ChannelError(.truncated, "\(channel.peerName) closed the connection in the middle of a request")
            }
        }
    }

    private static let tooLong = HTTPFailure(
        status: 431,
        reason: "the head is longer than \(HTTPFields.headLimit) bytes"
    )

    private func body(of head: HTTPRequestHead) async throws -> [UInt8] {
        guard head.fields["transfer-encoding"] == nil else {
            throw HTTPFailure(status: 501, reason: "a body comes with Content-Length only")
        }
        guard let length = head.fields["content-length"] else {
            guard head.method != "POST" else { throw HTTPFailure(status: 411, reason: "there is no Content-Length") }
            return []
        }
        guard length.utf8.allSatisfy({ (48...57).contains($0) }), !length.isEmpty, let count = Int(length) else {
            throw HTTPFailure(status: 400, reason: "Content-Length is no number")
        }
        guard count <= WebLimits.body else {
            throw HTTPFailure(status: 413, reason: "a body has at most \(WebLimits.body) bytes")
        }
        if let expected = head.fields["expect"] {
            guard expected.lowercased() == "100-continue" else {
                throw HTTPFailure(status: 417, reason: "nothing but 100-continue may be expected")
            }
            if rest.count < count { try await write(Array("HTTP/1.1 100 Continue\r\n\r\n".utf8)) }
        }
        try await channel.withDeadline(patience.request, for: "A request's body") {
            while rest.count < count {
                guard try await fill() else {
                    throw ChannelError(
                        .truncated,
                        "\(channel.peerName) closed the connection in the middle of a request"
                    )
                }
            }
        }
        defer { rest.removeFirst(count) }
        return Array(rest[..<count])
    }

    /// Takes what was read and belongs to no request, for another protocol that goes on.
    func takeRest() -> [UInt8] {
        defer { rest = [] }
        return rest
    }

    /// Ends the connection after an answer to what was not read to its end: the client is told so, and what it still sends is taken for a
    /// moment, because the system would take the answer back with a connection that is closed on unread bytes.
    func linger() async {
        _ = try? await channel.withDeadline(.seconds(1), for: "The end") {
            try await channel.finishWriting()
            var taken = 0
            while taken < 4 * HTTPFields.headLimit {
                let count = try await channel.readSome(into: buffer.mutable(0..<buffer.capacity))
                if count == 0 { return }
                taken += count
            }
        }
    }

    /// Sends an answer.
    func write(_ bytes: [UInt8]) async throws {
        try await channel.withDeadline(patience.answer, for: "An answer") { try await channel.write(bytes) }
    }
}
