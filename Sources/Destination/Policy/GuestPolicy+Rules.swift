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
        "allow-listen": { policy, value in
            let address = HostAddress.withoutBrackets(value)
            guard value == "all" || HostAddress(address) != nil || isHostName(address) else {
                throw GuestError(
                    "'\(value)' is neither 'all' nor an address or a name of a host; a rule is for one, without a port"
                )
            }
            policy.listenAddresses.add(address)
        },
        "allow-seed": { policy, value in
            // Identities have '=' in them.
            guard let end = value.ranges(of: "=/").last?.lowerBound, end > value.startIndex else {
                throw GuestError("'\(value)' is not IDENTITY=DIR with an absolute path")
            }
            policy.seedDirectories[trimmed(value[..<end]), default: []].append(String(value[end...].dropFirst()))
        },
        "most-memory": { $0.limits.memory = try size($1, least: leastMemory) },
        "most-processors": { $0.limits.processors = try count($1) },
        "most-disk": { $0.limits.disk = try size($1, least: leastDisk) },
        "most-guests": { $0.limits.guests = try count($1) },
        "most-incoming": { $0.mostIncoming = try count($1) },
        "allow-recall": { $0.recallers.append($1) },
        "allow-console": { policy, value in
            let (identity, mayWrite) = try consoleReader(value)
            // What is said twice is said in the narrower way.
            policy.consoleReaders[identity] = mayWrite && policy.consoleReaders[identity] ?? true
        },
        "guest-network": { policy, value in
            guard let network = Network(rawValue: value) else {
                throw GuestError("'\(value)' is neither 'filtered' nor 'host'")
            }
            policy.network = network
        },
    ]

    /// What somebody would call a mode, in small letters: an identity that ends so is put in quotes.
    private static let modeWords: Set<Substring> = [
        "look", "looks", "read", "reads", "readonly", "read-only", "ro", "write", "writes", "readwrite", "read-write",
        "rw", "act", "type",
        "viewonly", "view-only", "viewer", "only", "view",
    ]

    /// Reads `IDENTITY`, `IDENTITY view`, and both with the identity in double quotes.
    private static func consoleReader(_ value: String) throws -> (identity: String, mayWrite: Bool) {
        var (identity, mode) = (value, "")
        if value.hasPrefix("\"") {
            guard let end = value.dropFirst().lastIndex(of: "\"") else {
                throw GuestError("'\(value)' has no second quote")
            }
            identity = String(value[value.index(after: value.startIndex)..<end])
            mode = trimmed(value[value.index(after: end)...])
        } else if let space = value.lastIndex(where: \.isWhitespace),
            modeWords.contains(Substring(value[value.index(after: space)...].lowercased()))
        {
            (identity, mode) = (trimmed(value[..<space]), String(value[value.index(after: space)...]))
        }
        guard !identity.isEmpty, identity != "view" else { throw GuestError("'\(value)' names no identity") }
        guard mode.isEmpty || mode == "view" else {
            throw GuestError(
                "'\(mode)' behind the identity is nothing that it may do: write IDENTITY view to let it read, or IDENTITY alone to let it write, "
                    + "too; put the identity in double quotes when '\(mode)' belongs to it"
            )
        }
        return (identity, mode.isEmpty)
    }

    /// Below these no guest would fit, so that something else was meant: another unit.
    private static let (leastMemory, leastDisk) = (UInt64(1 << 20), UInt64(1 << 20))
    /// More than any host has: a number that is not one of guests or processors.
    private static let mostCount = UInt64(1 << 20)

    private static func size(_ text: String, least: UInt64) throws -> UInt64 {
        guard let size = ByteSize.parse(text) else {
            throw GuestError("'\(text)' is no size: a number, with K, M, G or T if you like")
        }
        guard size >= least else {
            throw GuestError(
                "'\(text)' is \(size) bytes, in which no guest fits; write its unit (64G), or close the host with 'crossdock cordon'"
            )
        }
        return size
    }

    private static func count(_ text: String) throws -> UInt64 {
        guard let count = UInt64(text) else { throw GuestError("'\(text)' is no number") }
        guard count > 0 else {
            throw GuestError("0 lets no guest in; 'crossdock cordon' does that and says it to those who come")
        }
        guard count <= mostCount else { throw GuestError("'\(text)' is more than \(mostCount), which no host has") }
        return count
    }

    private static func isHostName(_ text: String) -> Bool {
        !text.isEmpty && text.utf8.count <= 253
            && text.utf8.allSatisfy {
                ($0 >= 48 && $0 <= 57) || ($0 >= 65 && $0 <= 90) || ($0 >= 97 && $0 <= 122)
                    || [45, 46, 95].contains($0)
            }
    }

    /// The rules that replace what was said before: in one file each is said once.
    private static let single: Set<String> = [
        "most-memory", "most-processors", "most-disk", "most-guests", "most-incoming", "guest-network",
    ]

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
        var said: [String: Int] = [:]
        for (index, line) in text.split(separator: "\n", omittingEmptySubsequences: false).enumerated() {
            let rule = Self.trimmed(line.prefix { $0 != "#" })
            if rule.isEmpty { continue }
            do {
                guard let equals = rule.firstIndex(of: "=") else { throw GuestError("a line is 'rule = value'") }
                let name = Self.trimmed(rule[..<equals])
                try apply(name, Self.trimmed(rule[rule.index(after: equals)...]))
                if let before = said[name], Self.single.contains(name) {
                    throw GuestError("\(name): line \(before) says it already; only one of them can count")
                }
                said[name] = index + 1
            } catch { throw GuestError("\(file), line \(index + 1): \(error)") }
        }
    }

    private static func trimmed(_ text: some StringProtocol) -> String {
        let isSpace = { (character: Character) in character.isWhitespace }
        return String(String(text.drop(while: isSpace).reversed()).drop(while: isSpace).reversed())
    }
}
