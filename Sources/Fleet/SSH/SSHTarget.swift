internal import IO

/// A host as an operator names it for SSH, and how it is recognised.
public struct SSHTarget: Sendable, Hashable, Codable {
    /// `HOST` or `USER@HOST`: an alias of `~/.ssh/config` counts.
    public var destination: String
    /// The port; nil for what the configuration says.
    public var port: UInt16?
    /// A private key; nil for those of the agent and the configuration.
    public var identity: String?
    /// A file of known hosts in the place of the user's; nil for that.
    public var knownHosts: String?
    /// The fingerprint that an unknown key must have, `SHA256:...`; nil to ask.
    public var fingerprint: String?

    /// Reads `[USER@]HOST[:PORT]`; an IPv6 address with a port stands in brackets.
    ///
    /// - Throws: `FleetError` for what is none.
    public init(parsing text: String) throws {
        let malformed = FleetError("'\(text.shown(most: 200))' is no host; write [USER@]HOST[:PORT]")
        let (user, rest) = Self.split(text)
        var host = rest
        if host.hasPrefix("["), let end = host.lastIndex(of: "]") {
            let after = host[host.index(after: end)...]
            if !after.isEmpty {
                guard after.hasPrefix(":"), let number = UInt16(after.dropFirst()), number > 0 else { throw malformed }
                port = number
            }
            host = String(host[host.index(after: host.startIndex)..<end])
        } else if host.count(where: { $0 == ":" }) == 1, let colon = host.firstIndex(of: ":") {
            guard let number = UInt16(host[host.index(after: colon)...]), number > 0 else { throw malformed }
            port = number
            host = String(host[..<colon])
        }
        // What begins with a hyphen would be an option of a program that is named in a remedy.
        let words = [user, host].compactMap { $0 }
        guard !host.isEmpty, words.allSatisfy({ !$0.isEmpty && !$0.hasPrefix("-") }),
            words.joined().utf8.allSatisfy({ $0 > 32 && $0 < 127 && !"'\"\\`$;&|<>(){}*?![]".utf8.contains($0) })
        else { throw malformed }
        destination = user.map { "\($0)@\(host)" } ?? host
    }

    private static func split(_ text: String) -> (user: String?, rest: String) {
        guard let at = text.lastIndex(of: "@") else { return (nil, text) }
        return (String(text[..<at]), String(text[text.index(after: at)...]))
    }

    /// The user; nil for what the configuration says.
    public var user: String? { Self.split(destination).user }

    /// The host without the user.
    public var host: String { Self.split(destination).rest }
}
