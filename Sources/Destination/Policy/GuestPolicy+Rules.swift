internal import Emulator
internal import IO

/// The rules by their names, as flags and the file of a policy write them.
extension GuestPolicy {
    private typealias Setter = @Sendable (inout GuestPolicy, String) throws -> Void

    /// What each rule does with its value.
    private static let rules: [String: Setter] = [
        "allow-directory": { policy, value in
            guard value.hasPrefix("/") else { throw GuestError("'\(value)' is no absolute path") }
            policy.directories.append(value)
        },
        "allow-bridge": { policy, value in
            guard value == "all" || value.utf8.count < 16 && !value.contains("/") else {
                throw GuestError("'\(value)' is no name of a bridge")
            }
            policy.bridges.add(value)
        },
        "allow-listen": { $0.listenAddresses.add(HostAddress.withoutBrackets($1)) },
        "most-memory": { $0.limits.memory = try size($1) },
        "most-processors": { $0.limits.processors = try count($1) },
        "most-disk": { $0.limits.disk = try size($1) },
        "most-guests": { $0.limits.guests = try count($1) },
        "guest-network": { policy, value in
            guard let network = Network(rawValue: value) else {
                throw GuestError("'\(value)' is neither 'filtered' nor 'host'")
            }
            policy.network = network
        },
    ]

    private static func size(_ text: String) throws -> UInt64 {
        guard let size = ByteSize.parse(text) else {
            throw GuestError("'\(text)' is no size: a number, with K, M, G or T if you like")
        }
        return size
    }

    private static func count(_ text: String) throws -> UInt64 {
        guard let count = UInt64(text) else { throw GuestError("'\(text)' is no number") }
        return count
    }

    /// Applies a rule: those that allow add to what was said, the others replace it.
    ///
    /// - Parameters:
    ///   - rule: its name: that of a flag without its dashes.
    ///   - value: what it says.
    /// - Throws: `GuestError` that says what is wrong.
    public mutating func apply(_ rule: String, _ value: String) throws {
        guard let set = Self.rules[rule] else {
            throw GuestError(
                "There is no rule '\(rule)'; the rules are \(Self.rules.keys.sorted().joined(separator: ", "))"
            )
        }
        guard !value.isEmpty else { throw GuestError("\(rule): it has no value") }
        do { try set(&self, value) } catch let error as GuestError { throw GuestError("\(rule): \(error)") }
    }

    /// Reads a file of rules: `rule = value` in each line, where `#` begins a comment.
    ///
    /// - Parameters:
    ///   - text: what is in it.
    ///   - file: its name, for messages.
    /// - Throws: `GuestError` with the file and the line.
    public init(parsing text: String, file: String) throws {
        self.init()
        for (index, line) in text.split(separator: "\n", omittingEmptySubsequences: false).enumerated() {
            let rule = Self.trimmed(line.prefix { $0 != "#" })
            if rule.isEmpty { continue }
            do {
                guard let equals = rule.firstIndex(of: "=") else { throw GuestError("a line is 'rule = value'") }
                try apply(Self.trimmed(rule[..<equals]), Self.trimmed(rule[rule.index(after: equals)...]))
            } catch { throw GuestError("\(file), line \(index + 1): \(error)") }
        }
    }

    private static func trimmed(_ text: some StringProtocol) -> String {
        let isSpace = { (character: Character) in character.isWhitespace }
        return String(String(text.drop(while: isSpace).reversed()).drop(while: isSpace).reversed())
    }
}
