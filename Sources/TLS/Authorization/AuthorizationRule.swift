internal import Glibc

/// What a rule, or a list without a matching rule, decides.
public enum AuthorizationPolicy: String, Sendable, CaseIterable {
    /// The identity may pass.
    case allow
    /// The identity may not pass.
    case deny
}

/// One line of an `authz-list`: which identities it is about, and what it decides for them.
public struct AuthorizationRule: Sendable, Equatable {
    /// How `match` is compared.
    public enum Format: String, Sendable, CaseIterable {
        /// Byte for byte.
        case exact
        /// `*` stands for any characters, `?` for one; nothing else is special.
        case glob
    }

    /// The identity or the pattern.
    public var match: String
    /// What is decided.
    public var policy: AuthorizationPolicy
    /// How it is compared.
    public var format: Format

    /// Makes a rule.
    public init(match: String, policy: AuthorizationPolicy, format: Format = .exact) {
        self.match = match
        self.policy = policy
        self.format = format
    }

    /// Whether the rule is about this identity.
    public func matches(_ identity: String) -> Bool {
        switch format {
        case .exact: Array(match.utf8) == Array(identity.utf8)
        case .glob: Self.glob(Array(match.unicodeScalars), Array(identity.unicodeScalars))
        }
    }

    /// Whether the rule is about a peer with these names, the main one first.
    ///
    /// Only a rule that begins with `DNS:`, `IP:`, `URI:`, `EMAIL:` or `OTHER:` is compared with alternative names, so that a
    /// pattern which was written for distinguished names is not met by something else.
    func matches(any identities: [String]) -> Bool {
        guard let main = identities.first else { return false }
        if matches(main) { return true }
        guard ["DNS:", "IP:", "URI:", "EMAIL:", "OTHER:"].contains(where: match.hasPrefix) else { return false }
        return identities.dropFirst().contains(where: matches)
    }

    /// Goes back to the last star only, so that the work is bounded by the product of the lengths.
    private static func glob(_ pattern: [Unicode.Scalar], _ text: [Unicode.Scalar]) -> Bool {
        var position = 0
        var cursor = 0
        var star: (pattern: Int, text: Int)?
        while cursor < text.count {
            if position < pattern.count, pattern[position] == "*" {
                star = (position, cursor)
                position += 1
            } else if position < pattern.count, pattern[position] == "?" || pattern[position] == text[cursor] {
                position += 1
                cursor += 1
            } else if let last = star {
                star = (last.pattern, last.text + 1)
                position = last.pattern + 1
                cursor = last.text + 1
            } else {
                return false
            }
        }
        return pattern[position...].allSatisfy { $0 == "*" }
    }

    /// Reads the rules of an object or of a file.
    static func parse(_ readers: [PropertyReader]) throws -> [AuthorizationRule] {
        try readers.map { reader in
            var reader = reader
            let rule = AuthorizationRule(
                match: try reader.required("match"),
                policy: try reader.choice("policy") ?? .deny,
                format: try reader.choice("format") ?? .exact
            )
            try reader.finish()
            return rule
        }
    }
}
