internal import CWebPage
internal import IO
internal import TLS

/// A file of the page, which is a part of the program.
struct PageFile: Sendable {
    /// Its bytes.
    let bytes: [UInt8]
    /// Its MIME type.
    let type: String
    /// What tells it from another version of itself (RFC 9110, section 8.8.3).
    let tag: String

    static let types = [
        "html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8",
        "svg": "image/svg+xml; charset=utf-8", "png": "image/png", "ico": "image/x-icon", "json": "application/json",
        "webmanifest": "application/manifest+json", "woff2": "font/woff2", "txt": "text/plain; charset=utf-8",
    ]

    /// The files, by their paths below `Sources/Web/Page`.
    static let all: [String: PageFile] = {
        var files: [String: PageFile] = [:]
        var index = 0
        while let name = xd_page_file_at(index).name {
            let file = xd_page_file_at(index)
            let path = String(cString: name)
            let bytes = Array(UnsafeBufferPointer(start: file.bytes, count: file.size))
            files[path] = PageFile(
                bytes: bytes,
                type: types[String(path.split(separator: ".").last ?? "")] ?? "application/octet-stream",
                tag: "\"\(HashAlgorithm.sha256.hash(bytes).prefix(16).hex)\""
            )
            index += 1
        }
        return files
    }()

    /// The answer to who asks for it: nothing when the client has this version.
    func response(to request: HTTPRequest) -> HTTPResponse {
        let known = (request.fields["if-none-match"] ?? "").split(separator: ",").contains {
            $0.drop { $0 == " " } == tag
        }
        var response = HTTPResponse(known ? 304 : 200)
        if !known {
            response.body = bytes
            response.fields = [("Content-Type", type)]
        }
        response.fields.append(("ETag", tag))
        // Asked for again each time: a new release is seen at once.
        response.cacheControl = "no-cache"
        return response
    }
}
