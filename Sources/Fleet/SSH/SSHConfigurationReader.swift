internal import Glibc
internal import IO

/// Reads OpenSSH's configuration for a host: aliases, names, ports, users, keys, jump hosts and included files.
///
/// It never runs a program: `Match exec`, `ProxyCommand`, `KnownHostsCommand` and `LocalCommand` are not carried out, and said where they
/// would have mattered. Nothing in it weakens the check of the host's key.
public struct SSHConfigurationReader: Sendable {
    /// Who reads, and where.
    public struct Person: Sendable {
        /// The home directory.
        public var home: String
        /// The user's name.
        public var user: String
        /// The user's number.
        public var number: UInt32
        /// This host's name.
        public var hostName: String

        /// Describes a person.
        public init(home: String, user: String, number: UInt32, hostName: String) {
            self.home = home
            self.user = user
            self.number = number
            self.hostName = hostName
        }

        /// Who runs this process, as the password file says, which is what `ssh` goes by.
        public static var current: Person {
            var name = [CChar](repeating: 0, count: 256)
            gethostname(&name, name.count - 1)
            let host = String(decoding: name.prefix { $0 != 0 }.map(UInt8.init(bitPattern:)), as: UTF8.self)
            guard let entry = getpwuid(getuid())?.pointee else {
                return Person(home: "/", user: "\(getuid())", number: getuid(), hostName: host)
            }
            return Person(
                home: String(cString: entry.pw_dir),
                user: String(cString: entry.pw_name),
                number: getuid(),
                hostName: host
            )
        }
    }

    private let person: Person
    private let files: [String]

    /// Names the files.
    ///
    /// - Parameters:
    ///   - person: who reads.
    ///   - files: the files, the one that counts first; the person's and the system's when nil.
    public init(_ person: Person = .current, files: [String]? = nil) {
        self.person = person
        self.files = files ?? ["\(person.home)/.ssh/config", "/etc/ssh/ssh_config"]
    }

    /// Finds out how a host is reached. Blocks.
    ///
    /// - Parameters:
    ///   - host: the host as the operator calls it.
    ///   - user: the user whom the operator named; nil for what the configuration says.
    ///   - port: the port that the operator named; nil for what the configuration says.
    /// - Throws: `FleetError` for a file that others may write, that is damaged, or that includes itself.
    public func settings(for host: String, user: String? = nil, port: UInt16? = nil) throws -> SSHSettings {
        var reading = Reading(person: person, original: host, user: user, port: port)
        for file in files { try reading.read(file) }
        if reading.wantsFinal {
            reading.isFinal = true
            for file in files { try reading.read(file) }
        }
        return try reading.settings()
    }

    /// One reading: the first value of a keyword counts.
    private struct Reading {
        let person: Person
        let original: String
        var values: [String: [String]] = [:]
        var identities: [String] = []
        var certificates: [String] = []
        var notes: [String] = []
        var proxyCommand: String?
        var wantsFinal = false
        var isFinal = false
        var isActive = true
        var depth = 0

        init(person: Person, original: String, user: String?, port: UInt16?) {
            self.person = person
            self.original = original
            if let user { values["user"] = [user] }
            if let port { values["port"] = ["\(port)"] }
        }

        var host: String {
            guard let name = values["hostname"]?.first else { return original }
            return expand(name, ["h": original])
        }
        var user: String { values["user"]?.first ?? person.user }
        var port: UInt16 { values["port"]?.first.flatMap { UInt16($0) } ?? 22 }

        mutating func note(_ text: String) { if !notes.contains(text) { notes.append(text) } }

        // MARK: files

        mutating func read(_ path: String) throws {
            guard let bytes = try DurableFile.read(path, limit: 4 << 20) else { return }
            var status = stat()
            guard stat(path, &status) == 0 else { return }
            guard status.st_uid == 0 || status.st_uid == person.number, status.st_mode & 0o022 == 0 else {
                throw FleetError(
                    "\(path) can be written by others, and is not believed; 'chmod go-w \(path)', or 'chown' it to yourself"
                )
            }
            let outer = isActive
            defer { isActive = outer }
            for (index, line) in String(decoding: bytes, as: UTF8.self).split(
                omittingEmptySubsequences: false,
                whereSeparator: \.isNewline
            ).enumerated() {
                let words = try SSHConfigurationReader.words(line, "\(path), line \(index + 1)")
                guard let keyword = words.first?.lowercased() else { continue }
                let rest = Array(words.dropFirst())
                let place = "\(path), line \(index + 1)"
                switch keyword {
                case "host": isActive = outer && SSHPattern.matches(rest, original)
                case "match": isActive = outer && matches(rest, place)
                case "include":
                    guard isActive else { continue }
                    guard depth < 16 else { throw FleetError("\(place): files are included in a circle") }
                    depth += 1
                    for pattern in rest { for file in included(pattern, by: path) { try read(file) } }
                    depth -= 1
                default: if isActive { try take(keyword, rest, place) }
                }
            }
        }

        private func included(_ pattern: String, by path: String) -> [String] {
            var name = expand(pattern, [:])
            if name.hasPrefix("~/") { name = person.home + name.dropFirst() }
            if !name.hasPrefix("/") { name = path.prefix(through: path.lastIndex(of: "/") ?? path.startIndex) + name }
            var found = glob_t()
            defer { globfree(&found) }
            guard glob(name, 0, nil, &found) == 0 else { return [] }
            return (0..<Int(found.gl_pathc)).compactMap { found.gl_pathv[$0].map { String(cString: $0) } }
        }

        // MARK: what counts

        private mutating func matches(_ words: [String], _ place: String) -> Bool {
            var result = true
            var left: [String] = []
            var index = 0
            while index < words.count {
                var criterion = words[index].lowercased()
                index += 1
                let isNegated = criterion.hasPrefix("!")
                if isNegated { criterion.removeFirst() }
                var holds: Bool
                switch criterion {
                case "all": holds = true
                case "canonical": holds = false
                case "final":
                    wantsFinal = true
                    holds = isFinal
                default:
                    guard index < words.count else { return false }
                    let argument = words[index]
                    index += 1
                    let patterns = argument.split(separator: ",").map(String.init)
                    switch criterion {
                    case "host": holds = SSHPattern.matches(patterns, host)
                    case "originalhost": holds = SSHPattern.matches(patterns, original)
                    case "user": holds = SSHPattern.matches(patterns, user)
                    case "localuser": holds = SSHPattern.matches(patterns, person.user)
                    default:
                        left.append(criterion)
                        continue
                    }
                }
                if holds == isNegated { result = false }
            }
            guard result, !left.isEmpty else { return result }
            note(
                "\(place): 'Match \(left[0])' is not carried out, so what follows it does not count"
                    + (left[0] == "exec" ? "; no program is run for a configuration" : "")
            )
            return false
        }

        private mutating func take(_ keyword: String, _ words: [String], _ place: String) throws {
            guard let first = words.first else { throw FleetError("\(place): \(keyword) says nothing") }
            switch keyword {
            case "identityfile": identities.append(first)
            case "certificatefile": certificates.append(first)
            case "proxycommand":
                guard values["proxyjump"] == nil else { return }
                values["proxyjump"] = ["none"]
                if first.lowercased() != "none" { proxyCommand = place }
            case "stricthostkeychecking":
                if !["yes", "ask"].contains(first.lowercased()) {
                    note("\(place): StrictHostKeyChecking \(first) is ignored; the host's key is checked all the same")
                }
                if values[keyword] == nil { values[keyword] = words }
            case "knownhostscommand": note("\(place): KnownHostsCommand is not run")
            case "pkcs11provider":
                if first.lowercased() != "none" {
                    note("\(place): PKCS11Provider is not used; a token's keys are used when an agent has them")
                }
            case "port":
                guard let number = UInt16(first), number > 0 else {
                    throw FleetError("\(place): '\(first)' is no port")
                }
                if values[keyword] == nil { values[keyword] = words }
            default: if values[keyword] == nil { values[keyword] = words }
            }
        }

        // MARK: the result

        private func expand(_ text: String, _ tokens: [Character: String]) -> String {
            var result = ""
            var rest = text[...]
            while let character = rest.popFirst() {
                if character == "%", let next = rest.first {
                    if next == "%" {
                        result.append("%")
                    } else if let value = tokens[next] {
                        result += value
                    } else {
                        result += "%\(next)"
                    }
                    rest.removeFirst()
                } else if character == "$", rest.first == "{", let end = rest.firstIndex(of: "}") {
                    let name = String(rest[rest.index(after: rest.startIndex)..<end])
                    result += getenv(name).map { String(cString: $0) } ?? ""
                    rest = rest[rest.index(after: end)...]
                } else {
                    result.append(character)
                }
            }
            return result
        }

        private func path(_ text: String) -> String {
            let short = person.hostName.split(separator: ".").first.map(String.init) ?? person.hostName
            let home = text.hasPrefix("~/") ? person.home + text.dropFirst() : text
            return expand(
                home,
                [
                    "d": person.home, "h": host, "n": original, "p": "\(port)", "r": user, "u": person.user,
                    "i": "\(person.number)", "l": person.hostName, "L": short,
                    "k": values["hostkeyalias"]?.first ?? original,
                ]
            )
        }

        private func says(_ keyword: String, _ value: String) -> Bool {
            values[keyword]?.first?.lowercased() == value
        }

        func settings() throws -> SSHSettings {
            var settings = SSHSettings(host: host.lowercased(), port: port, user: user)
            // What would be an option or a word of a shell elsewhere is no name here either.
            for word in [settings.host, user]
            where word.isEmpty || word.hasPrefix("-") || !word.utf8.allSatisfy({ $0 > 32 && $0 < 127 }) {
                throw FleetError(
                    "The SSH configuration for \(original) names '\(word.shown(most: 200))', which is no name"
                )
            }
            settings.identities =
                identities.filter { $0.lowercased() != "none" }.map(path)
            if identities.isEmpty {
                settings.identities = ["id_rsa", "id_ecdsa", "id_ecdsa_sk", "id_ed25519", "id_ed25519_sk"].map {
                    "\(person.home)/.ssh/\($0)"
                }
            }
            settings.certificates = certificates.map(path)
            settings.isIdentitiesOnly = says("identitiesonly", "yes")
            if let agent = values["identityagent"]?.first {
                switch agent {
                case "none": settings.agent = ""
                case "SSH_AUTH_SOCK": break
                default:
                    settings.agent =
                        agent.hasPrefix("$") && !agent.hasPrefix("${")
                        ? getenv(String(agent.dropFirst())).map { String(cString: $0) } ?? "" : path(agent)
                }
            }
            if let jump = values["proxyjump"]?.first, jump.lowercased() != "none" {
                settings.jumps = jump.split(separator: ",").map {
                    let hop = expand(
                        $0.hasPrefix("ssh://") ? String($0.dropFirst(6)) : String($0),
                        ["h": host, "n": original, "p": "\(port)", "r": user]
                    )
                    return hop.hasSuffix("/") ? String(hop.dropLast()) : hop
                }
            }
            settings.knownHosts = ((values["userknownhostsfile"] ?? []) + (values["globalknownhostsfile"] ?? []))
                .filter { $0.lowercased() != "none" }.map(path)
            settings.keyName = values["hostkeyalias"]?.first?.lowercased()
            settings.isStrict = says("stricthostkeychecking", "yes")
            settings.isHashing = says("hashknownhosts", "yes")
            settings.isBatch = says("batchmode", "yes")
            settings.allowsKeys = !says("pubkeyauthentication", "no")
            settings.allowsPassword = !says("passwordauthentication", "no")
            settings.allowsQuestions =
                !says("kbdinteractiveauthentication", "no") && !says("challengeresponseauthentication", "no")
            settings.family = values["addressfamily"]?.first?.lowercased() ?? "any"
            settings.notes = notes
            settings.proxyCommand = proxyCommand
            return settings
        }
    }

    /// The words of a line: a keyword and what is said of it, with `=` or white space between them, and quotes around what has spaces.
    static func words(_ line: Substring, _ place: String) throws -> [String] {
        var words: [String] = []
        var word: String?
        var quote: Character?
        for character in line {
            if let open = quote {
                if character == open { quote = nil } else { word?.append(character) }
                continue
            }
            switch character {
            case "\"", "'":
                quote = character
                word = word ?? ""
            case "#" where word == nil: return words
            case " ", "\t", "\u{c}":
                if let finished = word { words.append(finished) }
                word = nil
            case "=" where words.isEmpty && word != nil:
                words.append(word ?? "")
                word = nil
            case "=" where words.count == 1 && word == nil: continue
            default: word = (word ?? "") + String(character)
            }
        }
        guard quote == nil else { throw FleetError("\(place): a quotation does not end") }
        if let word { words.append(word) }
        return words
    }
}

/// OpenSSH's patterns: `*` for anything, `?` for one character, `!` before one that must not match.
enum SSHPattern {
    /// Whether one of the patterns matches, and none of those with `!` does.
    static func matches(_ patterns: [String], _ text: String) -> Bool {
        var isMatched = false
        for pattern in patterns {
            if pattern.hasPrefix("!") {
                if matches(Array(pattern.dropFirst().lowercased().utf8), Array(text.lowercased().utf8)) { return false }
            } else if matches(Array(pattern.lowercased().utf8), Array(text.lowercased().utf8)) {
                isMatched = true
            }
        }
        return isMatched
    }

    /// In time that is the product of the lengths at most.
    private static func matches(_ pattern: [UInt8], _ text: [UInt8]) -> Bool {
        var (p, t) = (0, 0)
        var star: (pattern: Int, text: Int)?
        while t < text.count {
            if p < pattern.count, pattern[p] == UInt8(ascii: "*") {
                star = (p, t)
                p += 1
            } else if p < pattern.count, pattern[p] == text[t] || pattern[p] == UInt8(ascii: "?") {
                p += 1
                t += 1
            } else if let last = star {
                star = (last.pattern, last.text + 1)
                p = last.pattern + 1
                t = last.text + 1
            } else {
                return false
            }
        }
        return pattern[p...].allSatisfy { $0 == UInt8(ascii: "*") }
    }
}
