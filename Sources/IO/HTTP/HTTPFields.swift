/// The lines of a head of HTTP/1.1 behind its first one (RFC 9112, section 5), parsed strictly: what two programs could understand in two ways is
/// refused.
///
/// There is no line folding, no bare CR or LF, no white space before a colon; a field that may come once comes once.
public struct HTTPFields: Sendable, Hashable {
    /// The most bytes of a head.
    public static let headLimit = 16 << 10
    /// The most fields of a head.
    public static let most = 100

    private struct Field: Sendable, Hashable {
        let name: String
        let value: String
    }

    /// Two of them could be understood as one or the other.
    private static let single: Set<String> = [
        "host", "content-length", "content-type", "origin", "cookie", "authorization", "expect", "if-none-match",
        "sec-websocket-key", "sec-websocket-accept", "sec-websocket-version", "location",
    ]

    private let fields: [Field]

    /// The value of a field; those of several fields of the name with commas between them (RFC 9110, section 5.3). Nil without one.
    ///
    /// - Parameter name: in lower case.
    public subscript(name: String) -> String? {
        let values = fields.filter { $0.name == name }.map(\.value)
        return values.isEmpty ? nil : values.joined(separator: ",")
    }

    /// Whether a token is in the list of a field, in upper or lower case.
    ///
    /// - Parameters:
    ///   - name: in lower case.
    ///   - token: in lower case.
    public func has(_ name: String, token: String) -> Bool {
        (self[name] ?? "").split(separator: ",").contains {
            Self.trimmed(Array($0.utf8)[...]).elementsEqual(token.utf8) { Self.lower($0) == $1 }
        }
    }

    /// Where a head ends that may not be complete yet: the offset behind its empty line; nil when there is none.
    ///
    /// - Parameters:
    ///   - bytes: what is there.
    ///   - start: how much of it was looked at before.
    public static func endOfHead(in bytes: UnsafeRawBufferPointer, from start: Int = 0) -> Int? {
        guard bytes.count >= 4 else { return nil }
        for index in min(max(0, start - 3), bytes.count - 3)..<(bytes.count - 3)
        where bytes[index] == 13 && bytes[index + 1] == 10 && bytes[index + 2] == 13 && bytes[index + 3] == 10 {
            return index + 4
        }
        return nil
    }

    /// Splits a head into its first line and its fields.
    ///
    /// - Parameter head: all of it, with the empty line at its end.
    /// - Throws: `HTTPFailure` with 400 or 431.
    static func parse(_ head: [UInt8]) throws(HTTPFailure) -> (start: ArraySlice<UInt8>, fields: HTTPFields) {
        guard head.count <= headLimit else {
            throw HTTPFailure(status: 431, reason: "the head is longer than \(headLimit) bytes")
        }
        var lines = try lines(of: head)
        guard lines.count >= 2, lines.removeLast().isEmpty, !lines.contains(where: \.isEmpty) else {
            throw HTTPFailure(status: 400, reason: "the head does not end")
        }
        let start = lines.removeFirst()
        guard lines.count <= most else {
            throw HTTPFailure(status: 431, reason: "the head has more than \(most) fields")
        }
        var fields: [Field] = []
        var seen: Set<String> = []
        for line in lines {
            let field = try field(line)
            if !seen.insert(field.name).inserted, single.contains(field.name) {
                throw HTTPFailure(status: 400, reason: "\(field.name) comes twice")
            }
            fields.append(field)
        }
        return (start, HTTPFields(fields: fields))
    }

    private static func lines(of head: [UInt8]) throws(HTTPFailure) -> [ArraySlice<UInt8>] {
        var lines: [ArraySlice<UInt8>] = []
        var (begin, index) = (0, 0)
        while index < head.count {
            switch head[index] {
            case 13:
                guard index + 1 < head.count, head[index + 1] == 10 else {
                    throw HTTPFailure(status: 400, reason: "a carriage return is not the end of a line")
                }
                lines.append(head[begin..<index])
                index += 2
                begin = index
            case 10: throw HTTPFailure(status: 400, reason: "a line ends without a carriage return")
            case 0: throw HTTPFailure(status: 400, reason: "the head has a zero byte")
            default: index += 1
            }
        }
        guard begin == head.count else { throw HTTPFailure(status: 400, reason: "the head does not end") }
        return lines
    }

    private static func field(_ line: ArraySlice<UInt8>) throws(HTTPFailure) -> Field {
        guard let colon = line.firstIndex(of: UInt8(ascii: ":")), colon > line.startIndex,
            line[..<colon].allSatisfy(isToken)
        else { throw HTTPFailure(status: 400, reason: "a line of the head is no field") }
        let value = trimmed(line[(colon + 1)...])
        guard value.allSatisfy({ $0 == 9 || ($0 >= 32 && $0 != 127) }),
            let text = String(validating: value, as: UTF8.self)
        else { throw HTTPFailure(status: 400, reason: "a field's value is not text") }
        return Field(name: String(decoding: line[..<colon].map(lower), as: UTF8.self), value: text)
    }

    static func trimmed(_ bytes: ArraySlice<UInt8>) -> ArraySlice<UInt8> {
        var rest = bytes
        while let first = rest.first, first == 32 || first == 9 { rest.removeFirst() }
        while let last = rest.last, last == 32 || last == 9 { rest.removeLast() }
        return rest
    }

    private static func lower(_ byte: UInt8) -> UInt8 { (65...90).contains(byte) ? byte | 32 : byte }

    /// What a name of a field and a method are made of (RFC 9110, section 5.6.2).
    static func isToken(_ byte: UInt8) -> Bool {
        switch byte {
        case 48...57, 65...90, 97...122: true
        case 33, 35...39, 42, 43, 45, 46, 94, 95, 96, 124, 126: true
        default: false
        }
    }
}
