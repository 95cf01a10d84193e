package import IO

/// A request whose target was understood.
package struct HTTPRequest: Sendable {
    /// The head as it came.
    package let head: HTTPRequestHead
    /// The names in its path, decoded: `/page/app.js` has two; the last one is empty when the path ends with a slash.
    package let path: [String]
    /// The body; empty when there is none.
    var body: [UInt8] = []

    var method: String { head.method }
    var fields: HTTPFields { head.fields }
    /// The path for messages.
    var shownPath: String { "/" + path.map { $0.shown(most: 80) }.joined(separator: "/").shown(most: 200) }

    /// Understands a head.
    ///
    /// - Throws: `HTTPFailure` with 400.
    package init(_ head: HTTPRequestHead) throws(HTTPFailure) {
        self.head = head
        path = try Self.path(of: head.target)
    }

    /// Whether it asks for the websocket of a console: `/consoles/GUEST/serial`.
    var isConsole: Bool { method == "GET" && path.count == 3 && path[0] == "consoles" && path[2] == "serial" }

    /// Whether it asks for the websocket of a screen: `/consoles/GUEST/vnc`. Without one the same path says how the screen stands.
    var isDisplay: Bool {
        method == "GET" && path.count == 3 && path[0] == "consoles" && path[2] == "vnc"
            && fields.has("upgrade", token: "websocket")
    }

    /// A value behind the question mark, as it is written; nil without one.
    func query(_ name: String) -> String? {
        let parts = head.target.utf8.split(separator: UInt8(ascii: "?"), maxSplits: 1, omittingEmptySubsequences: false)
        guard parts.count == 2 else { return nil }
        for pair in parts[1].split(separator: UInt8(ascii: "&")) where pair.starts(with: "\(name)=".utf8) {
            return String(decoding: pair.dropFirst(name.utf8.count + 1), as: UTF8.self)
        }
        return nil
    }

    /// What is behind the question mark is no part of it.
    private static func path(of target: String) throws(HTTPFailure) -> [String] {
        let bytes = Array(target.utf8.prefix { $0 != UInt8(ascii: "?") })
        var names: [String] = []
        for part in bytes.dropFirst().split(separator: UInt8(ascii: "/"), omittingEmptySubsequences: false) {
            names.append(try decoded(part))
        }
        return names == [""] ? [] : names
    }

    private static func decoded(_ part: ArraySlice<UInt8>) throws(HTTPFailure) -> String {
        var name: [UInt8] = []
        var index = part.startIndex
        while index < part.endIndex {
            if part[index] != UInt8(ascii: "%") {
                name.append(part[index])
                index += 1
                continue
            }
            guard part.endIndex - index >= 3,
                let byte = [UInt8](hex: String(decoding: part[(index + 1)..<(index + 3)], as: UTF8.self))?.first
            else { throw HTTPFailure(status: 400, reason: "the path has a percent sign without two digits") }
            name.append(byte)
            index += 3
        }
        // What could lead out of a directory, or end a path early, is in no name that there is here.
        guard let text = String(validating: name, as: UTF8.self),
            name.allSatisfy({ $0 > 31 && $0 != 127 && $0 != UInt8(ascii: "/") && $0 != UInt8(ascii: "\\") }),
            text != ".", text != ".."
        else { throw HTTPFailure(status: 400, reason: "the path has a name that is none") }
        return text
    }

    /// The value of a cookie; nil without one, and when it comes twice.
    package func cookie(_ name: String) -> String? {
        let found = (fields["cookie"] ?? "").utf8.split(separator: UInt8(ascii: ";")).compactMap { pair -> String? in
            let text = String(decoding: pair.drop { $0 == 32 }, as: UTF8.self)
            guard text.utf8.starts(with: "\(name)=".utf8) else { return nil }
            return String(decoding: text.utf8.dropFirst(name.utf8.count + 1), as: UTF8.self)
        }
        return found.count == 1 ? found[0] : nil
    }
}
