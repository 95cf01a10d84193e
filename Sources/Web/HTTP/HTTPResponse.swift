internal import Glibc
internal import IO

/// An answer.
struct HTTPResponse: Sendable {
    /// The status.
    var status: Int
    /// The fields of this answer, besides those that each has.
    var fields: [(name: String, value: String)] = []
    /// The body.
    var body: [UInt8] = []
    /// How long it may be kept: not at all, unless it is the same for everybody.
    var cacheControl = "no-store"

    /// No script, style or connection but our own, and no place in another's page.
    private static let policy =
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
        + "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"

    private static let reasons = [
        100: "Continue", 101: "Switching Protocols", 200: "OK", 202: "Accepted", 204: "No Content", 304: "Not Modified",
        400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
        408: "Request Timeout", 409: "Conflict", 411: "Length Required", 413: "Content Too Large",
        417: "Expectation Failed", 426: "Upgrade Required",
        429: "Too Many Requests", 431: "Request Header Fields Too Large", 500: "Internal Server Error",
        501: "Not Implemented", 503: "Service Unavailable", 505: "HTTP Version Not Supported",
    ]

    /// An answer without a body.
    init(_ status: Int) { self.status = status }

    /// An answer with a text.
    init(_ status: Int, text: String, type: String = "text/plain; charset=utf-8") {
        self.status = status
        body = Array(text.utf8)
        fields = [("Content-Type", type)]
    }

    /// An answer in JSON.
    init(_ status: Int, json: some Encodable) {
        self.status = status
        body = (try? JSONText.encode(json)) ?? Array("{}".utf8)
        fields = [("Content-Type", "application/json")]
    }

    /// A sentence that says why not.
    init(_ status: Int, error: String) { self.init(status, json: ["error": error]) }

    /// Whether it says that something was refused for want of a right.
    var isRefusal: Bool { status == 401 || status == 403 }

    /// The bytes.
    ///
    /// - Parameters:
    ///   - isHead: whether the body is left out, as a HEAD asks for.
    ///   - closes: whether the connection ends with it.
    func encoded(isHead: Bool = false, closes: Bool = false) -> [UInt8] {
        var text = "HTTP/1.1 \(status) \(Self.reasons[status] ?? "Status")\r\nDate: \(Self.date())\r\n"
        for (name, value) in fields { text += "\(name): \(value)\r\n" }
        // These have no body (RFC 9110, section 8.6).
        let hasBody = status != 204 && status != 304
        if hasBody { text += "Content-Length: \(body.count)\r\n" }
        text +=
            "Cache-Control: \(cacheControl)\r\nContent-Security-Policy: \(Self.policy)\r\nX-Content-Type-Options: nosniff\r\n"
            + "Referrer-Policy: no-referrer\r\nCross-Origin-Opener-Policy: same-origin\r\n"
            + "Cross-Origin-Resource-Policy: same-origin\r\n\(closes ? "Connection: close\r\n" : "")\r\n"
        return Array(text.utf8) + (hasBody && !isHead ? body : [])
    }

    /// Now, as RFC 9110, section 5.6.7, wants it: `Sun, 06 Nov 1994 08:49:37 GMT`.
    private static func date() -> String {
        var now = time(nil)
        var parts = tm()
        gmtime_r(&now, &parts)
        func two(_ number: Int32) -> String { number < 10 ? "0\(number)" : "\(number)" }
        let days = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"]
        let months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
        return
            "\(days[Int(parts.tm_wday)]), \(two(parts.tm_mday)) \(months[Int(parts.tm_mon)]) \(parts.tm_year + 1900) "
            + "\(two(parts.tm_hour)):\(two(parts.tm_min)):\(two(parts.tm_sec)) GMT"
    }
}
