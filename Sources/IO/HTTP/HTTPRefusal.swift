/// A server's answer that it does not give what was asked for.
public struct HTTPRefusal: Error, Sendable, Hashable, CustomStringConvertible {
    /// The most bytes of a body that are read.
    static let mostBytes = 8 << 10

    /// The status.
    public let status: Int
    /// The server's words for it: those of its body, a text or `{"error":"..."}`, cleaned of what is not to be shown; nil when there are none.
    public let sentence: String?
    private let phrase: String

    private struct Body: Decodable { var error: String }

    /// Reads one.
    ///
    /// - Parameters:
    ///   - head: the answer's head.
    ///   - body: what has come of its body.
    init(_ head: HTTPResponseHead, body: some Collection<UInt8>) {
        (status, phrase) = (head.status, head.reason)
        let type = (head.fields["content-type"] ?? "").lowercased()
        var text = ""
        if type.hasPrefix("application/json") {
            text = JSONText.decode(Body.self, from: Array(body))?.error ?? ""
        } else if type.hasPrefix("text/plain"), head.fields["transfer-encoding"] == nil {
            text = String(decoding: body, as: UTF8.self)
        }
        let words = text.split { $0.isNewline }.joined(separator: " ").shown(most: 1000)
        sentence = words.isEmpty ? nil : words
    }

    /// The server's words, or the status when it has none.
    public var description: String { sentence ?? "the answer is \(status) \(phrase)" }
}
