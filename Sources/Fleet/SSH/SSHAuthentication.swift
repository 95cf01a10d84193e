internal import CSSH
internal import Glibc
internal import IO

/// Who we are to an SSH server: the key that was named, the agent's, those of the configuration, then questions and a password.
struct SSHAuthentication {
    private let session: ssh_session
    private let settings: SSHSettings
    private let circumstances: SSHLogin.Circumstances
    /// Why something was not tried, a clause each.
    private var obstacles: [String] = []
    /// Keys that were tried.
    private var tried: Set<String> = []
    private var usedAgent = false

    /// Prepares for a session whose host is recognised.
    init(_ session: ssh_session, _ settings: SSHSettings, _ circumstances: SSHLogin.Circumstances) {
        self.session = session
        self.settings = settings
        self.circumstances = circumstances
    }

    private enum Outcome {
        /// We are in.
        case accepted
        /// It was good, and more is asked for.
        case partial
        /// No.
        case refused
    }

    private func outcome(_ code: Int32) throws -> Outcome {
        switch code {
        case Int32(SSH_AUTH_SUCCESS.rawValue): return .accepted
        case Int32(SSH_AUTH_PARTIAL.rawValue): return .partial
        case Int32(SSH_AUTH_DENIED.rawValue): return .refused
        default:
            // A server that has had enough ends the connection.
            if ssh_is_connected(session) == 0 { throw refusal("it ended the connection: \(SSHLogin.words(session))") }
            return .refused
        }
    }

    private func refusal(_ words: String) -> FleetError {
        let more = obstacles.isEmpty ? "" : "; \(obstacles.joined(separator: "; "))"
        return FleetError("\(settings.name) lets nobody in with these keys and this password: \(words)\(more)")
    }

    /// Logs in.
    ///
    /// - Throws: `FleetError` with what was not accepted, and what could not be tried.
    mutating func run() throws {
        if try outcome(ssh_userauth_none(session, nil)) == .accepted { return }
        // Servers may want a key and a password.
        for _ in 0..<4 {
            let methods = UInt32(bitPattern: ssh_userauth_list(session, nil))
            switch try attempt(methods) {
            case .accepted: return
            case .partial: continue
            case .refused: throw refusal("it takes \(Self.names(methods))")
            }
        }
        throw refusal("it asks for more and more")
    }

    private static func names(_ methods: UInt32) -> String {
        let names = [
            (SSH_AUTH_METHOD_PUBLICKEY, "keys"), (SSH_AUTH_METHOD_PASSWORD, "a password"),
            (SSH_AUTH_METHOD_INTERACTIVE, "answers"), (SSH_AUTH_METHOD_GSSAPI_MIC, "GSSAPI, which is not supported"),
            (SSH_AUTH_METHOD_HOSTBASED, "the word of a host, which is not supported"),
        ].filter { methods & UInt32($0.0) != 0 }.map(\.1)
        return names.isEmpty ? "nothing that is known" : names.joined(separator: ", ")
    }

    private mutating func attempt(_ methods: UInt32) throws -> Outcome {
        if methods & UInt32(SSH_AUTH_METHOD_PUBLICKEY) != 0, settings.allowsKeys {
            if let identity = circumstances.identity {
                let result = try use(identity, isNamed: true)
                if result != .refused { return result }
            }
            let result = try useAgent()
            if result != .refused { return result }
            for identity in settings.identities {
                let result = try use(identity, isNamed: false)
                if result != .refused { return result }
            }
        }
        if methods & UInt32(SSH_AUTH_METHOD_INTERACTIVE) != 0, settings.allowsQuestions {
            let result = try answerQuestions()
            if result != .refused { return result }
        }
        if methods & UInt32(SSH_AUTH_METHOD_PASSWORD) != 0, settings.allowsPassword { return try sayPassword() }
        return .refused
    }

    // MARK: keys

    private mutating func useAgent() throws -> Outcome {
        let socket = settings.agent ?? getenv("SSH_AUTH_SOCK").map { String(cString: $0) } ?? ""
        guard !usedAgent, !socket.isEmpty else { return .refused }
        usedAgent = true
        let preferred = ([circumstances.identity].compactMap { $0 } + settings.identities).flatMap(Self.publicKeys)
        guard let agent = SSHAgentFilter.connect(socket, preferred: preferred, isOnly: settings.isIdentitiesOnly) else {
            obstacles.append("the agent at \(socket.shown(most: 200)) does not answer")
            return .refused
        }
        guard ssh_set_agent_socket(session, agent) == SSH_OK else {
            close(agent)
            return .refused
        }
        return try outcome(ssh_userauth_agent(session, nil))
    }

    /// What stands next to a private key, or in its file, about its public part: certificates first, Base64.
    private static func publicKeys(of path: String) -> [String] {
        var found: [String] = []
        for file in ["\(path)-cert.pub", "\(path).pub", path] {
            guard let bytes = (try? DurableFile.read(file, limit: 1 << 20)) ?? nil else { continue }
            if let key = SSHKeyFile(bytes).publicKey { found.append(key) }
            let words = String(decoding: bytes, as: UTF8.self).split(whereSeparator: \.isWhitespace)
            if words.count >= 2, !words[0].hasPrefix("-") { found.append(String(words[1])) }
        }
        return found
    }

    private mutating func use(_ path: String, isNamed: Bool) throws -> Outcome {
        guard tried.insert(path).inserted else { return .refused }
        guard let bytes = try DurableFile.read(path, limit: 1 << 20) else {
            if isNamed { throw FleetError("The SSH key \(path) is not there") }
            return .refused
        }
        let file = SSHKeyFile(bytes)
        if let obstacle = file.obstacle {
            obstacles.append("\(path) is not used: \(obstacle)")
            return .refused
        }
        var passphrase: String?
        if file.isEncrypted {
            guard try isWanted(file), let answer = unlock(path) else { return .refused }
            passphrase = answer
        }
        var key: ssh_key?
        guard ssh_pki_import_privkey_file(path, passphrase ?? "", nil, nil, &key) == SSH_OK, let key else {
            obstacles.append("\(path) is damaged, or of a kind that libssh cannot use")
            return .refused
        }
        defer { ssh_key_free(key) }
        for certificate in ["\(path)-cert.pub"] + settings.certificates where DurableFile.exists(certificate) {
            let result = try use(certificate, for: key)
            if result != .refused { return result }
        }
        return try outcome(ssh_userauth_publickey(session, nil, key))
    }

    private mutating func use(_ certificate: String, for key: ssh_key) throws -> Outcome {
        var read: ssh_key?
        guard ssh_pki_import_cert_file(certificate, &read) == SSH_OK, let read else {
            obstacles.append(
                "the certificate \(certificate) is not used: it is damaged, or of a kind that libssh cannot use"
            )
            return .refused
        }
        defer { ssh_key_free(read) }
        guard let certified = ssh_key_dup(key) else { return .refused }
        defer { ssh_key_free(certified) }
        // Not the certificate of this key.
        guard ssh_pki_copy_cert_to_privkey(read, certified) == SSH_OK else { return .refused }
        return try outcome(ssh_userauth_publickey(session, nil, certified))
    }

    /// Whether the server would take the key: nobody is asked for the passphrase of one that it would not.
    private func isWanted(_ file: SSHKeyFile) throws -> Bool {
        guard let text = file.publicKey, let type = file.type else { return true }
        var key: ssh_key?
        guard ssh_pki_import_pubkey_base64(text, ssh_key_type_from_name(type), &key) == SSH_OK, let key else {
            return true
        }
        defer { ssh_key_free(key) }
        return try outcome(ssh_userauth_try_publickey(session, nil, key)) == .accepted
    }

    private mutating func unlock(_ path: String) -> String? {
        if let known = circumstances.answers[path] { return known }
        for _ in 0..<3 {
            guard !settings.isBatch,
                let answer = circumstances.question.ask("Passphrase of \(path): ", isSecret: true)
            else { break }
            var key: ssh_key?
            if ssh_pki_import_privkey_file(path, answer, nil, nil, &key) == SSH_OK {
                ssh_key_free(key)
                circumstances.answers[path] = answer
                return answer
            }
        }
        obstacles.append("\(path) has a passphrase, which was not given; an agent can have it ('ssh-add')")
        return nil
    }

    // MARK: questions

    private mutating func sayPassword() throws -> Outcome {
        let question = "Password of \(settings.name): "
        for round in 0..<3 {
            let known = round == 0 ? circumstances.answers[question] : nil
            guard !settings.isBatch, let answer = known ?? circumstances.question.ask(question, isSecret: true) else {
                if round == 0 { obstacles.append("nobody can be asked for a password") }
                return .refused
            }
            let result = try outcome(ssh_userauth_password(session, nil, answer))
            if result == .refused { continue }
            circumstances.answers[question] = answer
            return result
        }
        return .refused
    }

    private mutating func answerQuestions() throws -> Outcome {
        for round in 0..<3 {
            var code = ssh_userauth_kbdint(session, nil, nil)
            var isFirst = true
            while code == Int32(SSH_AUTH_INFO.rawValue) {
                let count = ssh_userauth_kbdint_getnprompts(session)
                for index in 0..<UInt32(max(count, 0)) {
                    var echo: CChar = 0
                    let said = ssh_userauth_kbdint_getprompt(session, index, &echo).map { String(cString: $0) } ?? ""
                    let question = "\(settings.name): \(said.shown(most: 300))"
                    let known = round == 0 && isFirst && echo == 0 ? circumstances.answers[question] : nil
                    guard !settings.isBatch,
                        let answer = known ?? circumstances.question.ask(question, isSecret: echo == 0)
                    else {
                        if round == 0 { obstacles.append("nobody can answer its questions") }
                        return .refused
                    }
                    if isFirst, echo == 0, count == 1 { circumstances.answers[question] = answer }
                    _ = ssh_userauth_kbdint_setanswer(session, index, answer)
                }
                if count > 0 { isFirst = false }
                code = ssh_userauth_kbdint(session, nil, nil)
            }
            let result = try outcome(code)
            if result != .refused { return result }
        }
        return .refused
    }
}
