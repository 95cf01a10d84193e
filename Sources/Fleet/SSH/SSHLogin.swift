internal import CLinux
internal import CSSH
internal import Glibc
internal import IO
internal import TLS

/// One SSH session, whose host was recognised and which has let us in, by libssh. libssh's own reader of configurations is off.
///
/// Used by one thread at a time, and its calls block, with a bound.
final class SSHLogin: @unchecked Sendable {
    // Unchecked: its connection's lock, or its relay's thread, has it alone.
    let session: ssh_session
    /// The user and host for messages.
    let name: String
    private let counter: UnsafeMutablePointer<ssh_counter_struct>
    private var descriptor: Int32 = -1
    private var heard: (bytes: UInt64, at: ContinuousClock.Instant) = (0, .now)
    private var asked = ContinuousClock.now

    /// How long the key exchange and an answer of the server may take.
    private static let patience = 20
    /// A host that was silent for so long is given up.
    private static let mostSilence = Duration.seconds(15)

    /// What is needed beside the settings.
    struct Circumstances {
        /// A key that the operator named; it is tried first.
        var identity: String?
        /// The only file of known hosts; nil for the usual ones.
        var knownHosts: String?
        /// The fingerprint that an unknown key must have; nil to ask.
        var fingerprint: String?
        /// Who answers questions.
        var question: OperatorQuestion
        /// What was answered before.
        var answers: SSHAnswers
        /// Who is told.
        var note: @Sendable (String) -> Void
    }

    /// Logs in over a connected socket, which it takes over.
    ///
    /// - Throws: `FleetError` that says why not, and what to do.
    init(over socket: Int32, _ settings: SSHSettings, _ circumstances: Circumstances) throws {
        var isTaken = false
        defer { if !isTaken { close(socket) } }
        guard let session = ssh_new() else { throw FleetError("There is no memory for an SSH session") }
        self.session = session
        name = settings.name
        counter = .allocate(capacity: 1)
        counter.initialize(to: ssh_counter_struct())
        // From here on the destructor ends the session.
        let known = try Self.knownHosts(settings, circumstances)
        let types = known.usual.types(of: settings.knownName) + known.further.types(of: settings.knownName)
        let codes = [
            xd_ssh_option_flag(session, SSH_OPTIONS_PROCESS_CONFIG, 0),
            xd_ssh_option_string(session, SSH_OPTIONS_HOST, settings.host),
            xd_ssh_option_port(session, UInt32(settings.port)),
            xd_ssh_option_string(session, SSH_OPTIONS_USER, settings.user),
            // The key is judged here, by all files that count.
            xd_ssh_option_string(session, SSH_OPTIONS_KNOWNHOSTS, "/dev/null"),
            xd_ssh_option_string(session, SSH_OPTIONS_GLOBAL_KNOWNHOSTS, "/dev/null"),
            xd_ssh_option_string(session, SSH_OPTIONS_HOSTKEYS, Self.algorithms(types)),
            xd_ssh_option_long(session, SSH_OPTIONS_TIMEOUT, Self.patience),
            xd_ssh_option_descriptor(session, socket),
        ]
        guard codes.allSatisfy({ $0 == SSH_OK }) else {
            throw FleetError("The SSH configuration for \(name) is refused: \(words)")
        }
        ssh_set_counters(session, nil, counter)
        isTaken = true
        guard ssh_connect(session) == SSH_OK else {
            throw FleetError("\(name) cannot be reached over SSH: \(words)")
        }
        try recognise(settings, circumstances, known)
        var authentication = SSHAuthentication(session, settings, circumstances)
        try authentication.run()
        descriptor = ssh_get_fd(session)
        _ = xd_set_nonblocking(descriptor)
        ssh_set_blocking(session, 0)
        heard.at = .now
    }

    deinit {
        ssh_set_blocking(session, 0)
        ssh_disconnect(session)
        ssh_free(session)
        counter.deallocate()
    }

    /// libssh's last words on this session.
    var words: String { Self.words(session) }

    static func words(_ session: ssh_session) -> String {
        let text = ssh_get_error(UnsafeMutableRawPointer(session)).map { String(cString: $0) } ?? ""
        return text.isEmpty ? "it said nothing" : text.shown(most: 500)
    }

    // MARK: whose host it is

    private typealias Known = (usual: KnownHosts, further: KnownHosts, file: String)

    private static func knownHosts(_ settings: SSHSettings, _ circumstances: Circumstances) throws -> Known {
        if let file = circumstances.knownHosts { return (try KnownHosts(reading: [file]), KnownHosts(text: ""), file) }
        let own = "\(SSHConfigurationReader.Person.current.home)/.ssh/known_hosts"
        let usual = try KnownHosts(reading: [own, "\(own)2", "/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2"])
        return (usual, try KnownHosts(reading: settings.knownHosts), own)
    }

    /// The algorithms of host keys, those of known keys first: a host has several keys, and another one than the known one would look changed.
    private static func algorithms(_ types: [String]) -> String {
        let all = [
            "ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "rsa-sha2-512",
            "rsa-sha2-256",
        ]
        let first = all.filter { algorithm in
            types.contains { $0 == algorithm || $0 == "ssh-rsa" && algorithm.hasPrefix("rsa-") }
        }
        return (first + all.filter { !first.contains($0) }).joined(separator: ",")
    }

    private func recognise(_ settings: SSHSettings, _ circumstances: Circumstances, _ known: Known) throws {
        var key: ssh_key?
        guard ssh_get_server_publickey(session, &key) == SSH_OK, let key else {
            throw FleetError("\(name) has shown no key: \(words)")
        }
        defer { ssh_key_free(key) }
        var text: UnsafeMutablePointer<CChar>?
        guard ssh_pki_export_pubkey_base64(key, &text) == SSH_OK, let text else {
            throw FleetError("The key of \(name) cannot be read: \(words)")
        }
        defer { ssh_string_free_char(text) }
        let blob = String(cString: text)
        let type = ssh_key_type_to_char(ssh_key_type(key)).map { String(cString: $0) } ?? "unknown"
        let fingerprint = SSHKey.fingerprint(of: key)
        let host = settings.knownName
        var verdict = known.usual.judge(host, blob)
        // What the configuration adds does not overrule what the usual files say.
        if case .unknown = verdict { verdict = known.further.judge(host, blob) }
        // As ssh does: the same key without the port is the same host.
        if case .unknown = verdict, settings.port != 22, settings.keyName == nil,
            known.usual.judge(settings.host, blob) == .known
        {
            verdict = .known
        }
        switch verdict {
        case .known: return
        case .revoked(let place):
            throw FleetError("The key of \(name), \(fingerprint), is revoked by \(place): it may be in other hands")
        case .changed(let place):
            throw FleetError(
                "The key of \(name), \(fingerprint), is another one than the known one (\(place)): somebody may be in between. If "
                    + "the host was installed anew, 'ssh-keygen -R \(host)' forgets the old key"
            )
        case .unknown(let isCertified):
            try accept(
                fingerprint,
                type,
                settings,
                circumstances,
                isCertified
                    ? " (an authority of its certificates is, which libssh cannot check)" : ""
            )
            note(host, type, blob, settings, circumstances, known.file)
        }
    }

    private func accept(
        _ fingerprint: String,
        _ type: String,
        _ settings: SSHSettings,
        _ circumstances: Circumstances,
        _ remark: String
    ) throws {
        if let expected = circumstances.fingerprint {
            guard fingerprint == expected else {
                throw FleetError("The key of \(name), \(fingerprint), has not the fingerprint that was given")
            }
            return
        }
        var text =
            "The key of \(name) is not known\(remark): \(type) \(fingerprint)\nIs it the host's? (yes, no, or its fingerprint) "
        if !settings.isStrict, !settings.isBatch {
            for _ in 0..<3 {
                guard let answer = circumstances.question.ask(text, isSecret: false) else { break }
                switch answer.trimmingSpaces {
                case "yes", fingerprint: return
                case "no": throw FleetError("The key of \(name) was not accepted")
                default: text = "Please type 'yes', 'no' or the fingerprint: "
                }
            }
        }
        throw FleetError(
            "The key of \(name), \(fingerprint), is not known here\(remark), and was not accepted; compare it with "
                + "'ssh-keygen -lf /etc/ssh/ssh_host_\(type.replacing("ssh-", with: ""))_key.pub' there, and say it with --fingerprint"
        )
    }

    /// Remembers an accepted key, as ssh does; that it cannot be written down stops nothing.
    private func note(
        _ host: String,
        _ type: String,
        _ key: String,
        _ settings: SSHSettings,
        _ circumstances: Circumstances,
        _ file: String
    ) {
        do {
            let salt = settings.isHashing ? (0..<20).map { _ in UInt8.random(in: 0...255) } : nil
            let line = try KnownHosts.line(host, type: type, key: key, salt: salt)
            if let slash = file.lastIndex(of: "/"), slash > file.startIndex { mkdir(String(file[..<slash]), 0o700) }
            let descriptor = open(file, O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
            guard descriptor >= 0 else { throw FileError("\(file): \(String(cString: strerror(errno)))") }
            defer { close(descriptor) }
            let end = lseek(descriptor, 0, SEEK_END)
            var last: UInt8 = 10
            if end > 0 { pread(descriptor, &last, 1, end - 1) }
            try DurableFile.append(Array(((last == 10 ? "" : "\n") + line).utf8), to: descriptor, path: file)
            circumstances.note("The key of \(name) is remembered in \(file)")
        } catch { circumstances.note("The key of \(name) is not remembered: \(error)") }
    }

    // MARK: waiting

    /// Whether the connection is there.
    var isConnected: Bool { ssh_is_connected(session) != 0 }

    /// Waits for something from the server, or for a while; a server that is silent for too long is given up.
    ///
    /// - Throws: `FleetError` when the connection is lost.
    func wait(and other: Int32 = -1, milliseconds: Int32 = 500) throws {
        let isWriting = ssh_get_status(session) & SSH_WRITE_PENDING != 0
        var polled = [
            pollfd(fd: descriptor, events: Int16(POLLIN) | (isWriting ? Int16(POLLOUT) : 0), revents: 0),
            pollfd(fd: other, events: Int16(POLLIN), revents: 0),
        ]
        poll(&polled, 2, milliseconds)
        let now = ContinuousClock.now
        if counter.pointee.in_bytes != heard.bytes { heard = (counter.pointee.in_bytes, now) }
        if now - heard.at > .seconds(3), now - asked > .seconds(3) {
            asked = now
            _ = ssh_send_keepalive(session)
        }
        guard isConnected else { throw FleetError("The connection to \(name) was lost: \(words)") }
        guard now - heard.at < Self.mostSilence else {
            throw FleetError("The connection to \(name) was lost: it has been silent for 15 s")
        }
    }

    /// Repeats a call until it is neither to be repeated nor out of time.
    func drive(_ what: String, _ call: () -> Int32) throws {
        let start = ContinuousClock.now
        while true {
            let code = call()
            if code == SSH_OK { return }
            guard code == SSH_AGAIN else { throw FleetError("\(name) does not \(what): \(words)") }
            guard ContinuousClock.now - start < .seconds(Self.patience) else {
                throw FleetError("\(name) does not \(what) within \(Self.patience) s")
            }
            try wait(milliseconds: 50)
        }
    }
}

/// What the operator has answered: a connection that is made again asks nothing twice.
final class SSHAnswers: Sendable {
    private let answers = Guarded<[String: String]>([:])

    subscript(question: String) -> String? {
        get { answers.withLock { $0[question] } }
        set { answers.withLock { $0[question] = newValue } }
    }
}

extension String {
    /// Without white space at its ends.
    var trimmingSpaces: String {
        let start = drop { $0.isWhitespace }
        return String(start.reversed().drop { $0.isWhitespace }.reversed())
    }
}
