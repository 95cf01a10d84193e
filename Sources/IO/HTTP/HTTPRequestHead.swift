/// The head of an HTTP/1.1 request (RFC 9112, section 3).
public struct HTTPRequestHead: Sendable, Hashable {
    /// The method, as it was sent: "GET".
    public let method: String
    /// The target in its origin form, as it was sent: a path with its first slash, and what follows a question mark.
    public let target: String
    /// The fields; Host is among them.
    public let fields: HTTPFields

    /// The most bytes of a method.
    private static let longestMethod = 16

    /// Parses a head.
    ///
    /// - Parameter bytes: all of it, with the empty line at its end; at most `HTTPFields.headLimit`.
    /// - Throws: `HTTPFailure` with 400, 431 or 505.
    public init(parsing bytes: [UInt8]) throws(HTTPFailure) {
        let (start, fields) = try HTTPFields.parse(bytes)
        let parts = start.split(separator: 32, omittingEmptySubsequences: false)
        guard parts.count == 3 else { throw HTTPFailure(status: 400, reason: "its first line is no request") }
        let version = Array(parts[2])
        guard version == Array("HTTP/1.1".utf8) else {
            let isHTTP = version.count == 8 && version.starts(with: "HTTP/".utf8)
            throw HTTPFailure(status: isHTTP ? 505 : 400, reason: "it is no HTTP/1.1 request")
        }
        guard (1...Self.longestMethod).contains(parts[0].count), parts[0].allSatisfy(HTTPFields.isToken) else {
            throw HTTPFailure(status: 400, reason: "its method is none")
        }
        guard parts[1].first == UInt8(ascii: "/") else {
            throw HTTPFailure(status: 400, reason: "the path does not begin with a slash")
        }
        guard parts[1].allSatisfy({ (33...126).contains($0) && $0 != UInt8(ascii: "#") }) else {
            throw HTTPFailure(status: 400, reason: "the path has characters that a path has not")
        }
        guard let host = fields["host"], !host.isEmpty else {
            throw HTTPFailure(status: 400, reason: "there is no Host")
        }
        method = String(decoding: parts[0], as: UTF8.self)
        target = String(decoding: parts[1], as: UTF8.self)
        self.fields = fields
    }
}
