internal import CSSH

/// libssh's handles of one session with one channel, and the calls on them. Used by one thread at a time.
final class SSHSession: @unchecked Sendable {
    // Unchecked: handed from the pool's thread to the loop once it is connected.
    private let session: ssh_session
    private let channel: ssh_channel
    private var isFreed = false

    /// The result of a call that does not wait.
    enum Outcome {
        /// So many bytes.
        case bytes(Int)
        /// The orderly end.
        case end
        /// Nothing at present.
        case wait
        /// The connection ended without an orderly end of the channel.
        case truncated
        /// Something else, in libssh's words.
        case failed(String)
    }

    private init(_ session: ssh_session, _ channel: ssh_channel) {
        self.session = session
        self.channel = channel
        ssh_set_blocking(session, 0)
    }

    deinit { free() }

    /// The socket.
    var descriptor: Int32 { ssh_get_fd(session) }

    /// Ends the session. Further calls are not allowed.
    func free() {
        guard !isFreed else { return }
        isFreed = true
        ssh_channel_free(channel)
        ssh_disconnect(session)
        ssh_free(session)
    }

    func read(into base: UnsafeMutableRawPointer, _ count: Int) -> Outcome {
        let result = ssh_channel_read_nonblocking(channel, base, UInt32(clamping: count), 0)
        discardErrors()
        if result > 0 { return .bytes(Int(result)) }
        // The end of the channel may have come in one piece with the end of the connection.
        if result == SSH_EOF || ssh_channel_is_eof(channel) != 0 { return .end }
        if ssh_is_connected(session) == 0 { return .truncated }
        if result == 0 || result == SSH_AGAIN { return .wait }
        return .failed(Self.words(session))
    }

    /// Takes at most 256 KiB; the peer's window bounds what libssh holds.
    func write(from base: UnsafeRawPointer, _ count: Int) -> Outcome {
        // libssh queues whatever the peer's window allows, which the peer chooses: nothing is added to what waits already.
        if ssh_get_status(session) & SSH_WRITE_PENDING != 0 {
            let flushed = flush()
            guard case .bytes = flushed else { return flushed }
        }
        let result = ssh_channel_write(channel, base, UInt32(clamping: min(count, 256 << 10)))
        if result > 0 { return .bytes(Int(result)) }
        return result == 0 || result == SSH_AGAIN ? .wait : .failed(Self.words(session))
    }

    func flush() -> Outcome {
        let code = ssh_blocking_flush(session, 0)
        // A session that broke has "flushed" what it dropped.
        if ssh_is_connected(session) == 0 { return .failed("the connection has ended") }
        switch code {
        case SSH_OK: return .bytes(0)
        case SSH_AGAIN: return .wait
        default: return .failed(Self.words(session))
        }
    }

    func sendEnd() -> Outcome { ssh_channel_send_eof(channel) == SSH_ERROR ? .failed(Self.words(session)) : .bytes(0) }

    /// A command's standard error shares the window with its output: left alone, it would stop the stream.
    private func discardErrors() {
        withUnsafeTemporaryAllocation(byteCount: 16 << 10, alignment: 8) { scratch in
            for _ in 0..<64 {
                guard ssh_channel_read_nonblocking(channel, scratch.baseAddress, UInt32(scratch.count), 1) > 0 else {
                    return
                }
            }
        }
    }

    /// Takes the packets that are there.
    func poll() { _ = ssh_channel_poll(channel, 0) }

    // MARK: Connecting

    /// Connects, checks the host's key, authenticates and opens the channel. Blocks: run it on the pool.
    static func open(_ configuration: SSHConfiguration, _ target: SSHConfiguration.Target) throws -> SSHSession {
        let name = "\(configuration.user)@\(configuration.host):\(configuration.port)"
        guard let session = ssh_new() else { throw ChannelError(.system, "There is no memory for an SSH session") }
        do {
            try configure(session, configuration)
            guard ssh_connect(session) == SSH_OK else {
                throw ChannelError(.system, "Cannot connect to the SSH server \(name): \(words(session))")
            }
            try checkHostKey(session, configuration)
            try authenticate(session, configuration, name)
            guard let channel = ssh_channel_new(session) else {
                throw ChannelError(.system, "Cannot open a channel to \(name): \(words(session))")
            }
            do {
                try open(channel, target, session, name)
            } catch {
                ssh_channel_free(channel)
                throw error
            }
            return SSHSession(session, channel)
        } catch {
            ssh_disconnect(session)
            ssh_free(session)
            throw error
        }
    }

    private static func configure(_ session: ssh_session, _ configuration: SSHConfiguration) throws {
        // The user's own configuration could switch the host key check off, or run commands.
        let seconds = max(1, configuration.timeout.components.seconds)
        let codes = [
            xd_ssh_option_flag(session, SSH_OPTIONS_PROCESS_CONFIG, 0),
            xd_ssh_option_string(session, SSH_OPTIONS_HOST, configuration.host),
            xd_ssh_option_port(session, UInt32(configuration.port)),
            xd_ssh_option_string(session, SSH_OPTIONS_USER, configuration.user),
            xd_ssh_option_string(session, SSH_OPTIONS_KNOWNHOSTS, configuration.knownHosts),
            xd_ssh_option_string(session, SSH_OPTIONS_GLOBAL_KNOWNHOSTS, "/dev/null"),
            xd_ssh_option_long(session, SSH_OPTIONS_TIMEOUT, Int(seconds)),
            xd_ssh_option_flag(session, SSH_OPTIONS_NODELAY, 1),
        ]
        guard codes.allSatisfy({ $0 == SSH_OK }) else {
            throw ChannelError(.system, "The SSH configuration for \(configuration.host) is refused: \(words(session))")
        }
    }

    private static func words(_ session: ssh_session) -> String {
        ssh_get_error(UnsafeMutableRawPointer(session)).map { String(cString: $0) } ?? "it said nothing"
    }

    private static func checkHostKey(_ session: ssh_session, _ configuration: SSHConfiguration) throws {
        let state = ssh_session_is_known_server(session)
        if state == SSH_KNOWN_HOSTS_OK { return }
        let fingerprint = Self.fingerprint(session)
        let file = configuration.knownHosts
        switch state {
        case SSH_KNOWN_HOSTS_CHANGED, SSH_KNOWN_HOSTS_OTHER:
            throw ChannelError(
                .tls,
                "The SSH host key of \(configuration.host) is not the one in \(file): it is now \(fingerprint). Somebody may be "
                    + "in between; only if the host has a new key, remove the old one from the file"
            )
        case SSH_KNOWN_HOSTS_UNKNOWN, SSH_KNOWN_HOSTS_NOT_FOUND:
            throw ChannelError(
                .tls,
                "The SSH host key of \(configuration.host), \(fingerprint), is not in \(file); compare it with the host's and add it"
            )
        default:
            throw ChannelError(.tls, "Cannot check the SSH host key of \(configuration.host): \(words(session))")
        }
    }

    private static func fingerprint(_ session: ssh_session) -> String {
        var key: ssh_key?
        guard ssh_get_server_publickey(session, &key) == SSH_OK, let key else { return "unknown" }
        defer { ssh_key_free(key) }
        return SSHKey.fingerprint(of: key)
    }

    private static func authenticate(
        _ session: ssh_session,
        _ configuration: SSHConfiguration,
        _ name: String
    ) throws {
        var key: ssh_key?
        let imported = ssh_pki_import_privkey_file(configuration.identity, nil, nil, nil, &key)
        guard imported == SSH_OK else {
            throw ChannelError(
                .tls,
                "Cannot use the SSH key \(configuration.identity): "
                    + (imported == SSH_EOF
                        ? "it is not there, or cannot be read" : "it is damaged, or has a passphrase")
            )
        }
        defer { ssh_key_free(key) }
        guard ssh_userauth_publickey(session, nil, key) == Int32(SSH_AUTH_SUCCESS.rawValue) else {
            throw ChannelError(
                .tls,
                "The SSH server \(name) does not accept the key \(configuration.identity); "
                    + "is its public part in the user's authorized_keys?"
            )
        }
    }

    private static func open(
        _ channel: ssh_channel,
        _ target: SSHConfiguration.Target,
        _ session: ssh_session,
        _ name: String
    ) throws {
        let code: Int32
        switch target {
        case .tcp(let host, let port): code = ssh_channel_open_forward(channel, host, Int32(port), "localhost", 0)
        case .command(let command):
            let opened = ssh_channel_open_session(channel)
            code = opened == SSH_OK ? ssh_channel_request_exec(channel, command) : opened
        }
        guard code == SSH_OK else {
            throw ChannelError(
                .system,
                "The SSH server \(name) does not open a channel to \(target): \(words(session))"
            )
        }
    }
}
