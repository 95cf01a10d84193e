/// The head of an HTTP/1.1 answer (RFC 9112, section 4).
public struct HTTPResponseHead: Sendable, Hashable {
    /// The status, 100 to 599.
    public let status: Int
    /// What the server says of it; empty when it says nothing.
    public let reason: String
    /// The fields.
    public let fields: HTTPFields

    /// Parses a head.
    ///
    /// - Parameter bytes: all of it, with the empty line at its end; at most `HTTPFields.headLimit`.
    /// - Throws: `HTTPFailure` with 0: there is nobody to be told.
    public init(parsing bytes: [UInt8]) throws(HTTPFailure) {
        let (start, fields): (ArraySlice<UInt8>, HTTPFields)
        do { (start, fields) = try HTTPFields.parse(bytes) } catch {
            throw HTTPFailure(status: 0, reason: error.reason)
        }
        let parts = start.split(separator: 32, maxSplits: 2, omittingEmptySubsequences: false)
        guard parts.count >= 2, parts[0].elementsEqual("HTTP/1.1".utf8) else {
            throw HTTPFailure(status: 0, reason: "the answer is not HTTP/1.1")
        }
        guard parts[1].count == 3, parts[1].allSatisfy({ (48...57).contains($0) }),
            let status = Int(String(decoding: parts[1], as: UTF8.self)), (100...599).contains(status)
        else { throw HTTPFailure(status: 0, reason: "the answer has no status") }
        self.status = status
        reason = parts.count == 3 ? String(decoding: parts[2], as: UTF8.self).shown(most: 100) : ""
        self.fields = fields
    }
}
