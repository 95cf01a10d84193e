internal import IO
internal import TLS

/// The keys of known hosts, as OpenSSH's files have them: with hidden names, patterns, and keys that are revoked.
public struct KnownHosts: Sendable {
    /// What is known of a key that a host has shown.
    public enum Verdict: Sendable, Hashable {
        /// It is the host's.
        case known
        /// Nothing is known of the host; `isCertified` when an authority for its certificates is, which is no use here.
        case unknown(isCertified: Bool)
        /// The host has another one; where that is written.
        case changed(String)
        /// Nobody may believe it any more; where that is written.
        case revoked(String)
    }

    private struct Entry {
        var place: String
        var marker: String?
        var names: String
        var type: String
        var key: String
    }

    private var entries: [Entry] = []

    /// Reads files, of which some may not be there.
    ///
    /// - Throws: `FileError` for one that cannot be read.
    public init(reading paths: [String]) throws {
        for path in paths {
            guard let bytes = try DurableFile.read(path, limit: 64 << 20) else { continue }
            add(String(decoding: bytes, as: UTF8.self), path)
        }
    }

    /// Reads a text.
    public init(text: String) { add(text, "line") }

    private mutating func add(_ text: String, _ path: String) {
        for (index, line) in text.split(omittingEmptySubsequences: false, whereSeparator: \.isNewline).enumerated() {
            var words = line.split(whereSeparator: { $0 == " " || $0 == "\t" }).map(String.init)
            guard let first = words.first, !first.hasPrefix("#") else { continue }
            let marker = first.hasPrefix("@") ? words.removeFirst() : nil
            guard words.count >= 3 else { continue }
            entries.append(
                Entry(place: "\(path):\(index + 1)", marker: marker, names: words[0], type: words[1], key: words[2])
            )
        }
    }

    private func entries(of name: String) -> [Entry] { entries.filter { Self.matches($0.names, name) } }

    private static func matches(_ names: String, _ name: String) -> Bool {
        guard names.hasPrefix("|1|") else {
            return SSHPattern.matches(names.split(separator: ",").map(String.init), name)
        }
        let parts = names.split(separator: "|").map(String.init)
        guard parts.count == 3, let salt = Base64.decode(parts[1].utf8), let hash = Base64.decode(parts[2].utf8),
            let own = try? Hash.hmac(.sha1, key: salt, of: Array(name.utf8))
        else { return false }
        return own.matches(Digest(bytes: hash))
    }

    /// The types of keys that are known of a host: these are asked for first, or another one of the host's keys would look unknown.
    public func types(of name: String) -> [String] { entries(of: name).filter { $0.marker == nil }.map(\.type) }

    /// Judges a key.
    ///
    /// - Parameters:
    ///   - name: the host, with its port in brackets if that is another than 22.
    ///   - key: the key, Base64.
    public func judge(_ name: String, _ key: String) -> Verdict {
        let found = entries(of: name)
        if let bad = found.first(where: { $0.marker == "@revoked" && $0.key == key }) { return .revoked(bad.place) }
        let plain = found.filter { $0.marker == nil }
        if plain.contains(where: { $0.key == key }) { return .known }
        if let other = plain.first { return .changed(other.place) }
        return .unknown(isCertified: found.contains { $0.marker == "@cert-authority" })
    }

    /// A line for a host and its key.
    ///
    /// - Parameter salt: what the name is hidden with; nil to write it as it is.
    public static func line(_ name: String, type: String, key: String, salt: [UInt8]? = nil) throws -> String {
        var shown = name
        if let salt {
            let hash = try Hash.hmac(.sha1, key: salt, of: Array(name.utf8))
            shown = "|1|\(Base64.encode(salt))|\(Base64.encode(hash.bytes))"
        }
        return "\(shown) \(type) \(key)\n"
    }
}
