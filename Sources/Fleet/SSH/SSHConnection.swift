internal import CLinux
internal import CSSH
internal import Glibc
internal import IO

/// A connection to a host over SSH that several commands use: who it is for is asked and proved once.
///
/// libssh speaks the protocol. The operator's own configuration says how the host is reached (`SSHConfigurationReader`), and a jump host is
/// passed by a channel of ours. Each host on the way is recognised by its key.
public final class SSHConnection: Sendable {
    private let target: SSHTarget
    private let hops: [SSHSettings]
    private let question: OperatorQuestion
    private let answers = SSHAnswers()
    private let note: @Sendable (String) -> Void
    private let login = Guarded<SSHLogin?>(nil)

    /// The most bytes of an answer.
    private static let limit = 16 << 20
    /// The most hosts on the way.
    private static let mostHops = 8

    /// Connects. Blocks: run it on the pool.
    ///
    /// - Parameters:
    ///   - target: the host.
    ///   - isBatch: whether nobody can be asked: an unknown key and a password are errors then.
    ///   - note: is told what is to be known, a sentence each.
    /// - Throws: `FleetError` that says why not, and what to do.
    public init(to target: SSHTarget, isBatch: Bool, note: @escaping @Sendable (String) -> Void = { _ in }) throws {
        self.target = target
        self.note = note
        question = OperatorQuestion(isBatch: isBatch)
        hops = try Self.way(to: target, by: SSHConfigurationReader())
        var said: Set<String> = []
        for text in hops.flatMap(\.notes) where said.insert(text).inserted { note(text) }
        let login = try connect(question)
        self.login.withLock { $0 = login }
    }

    /// All hosts on the way, the last the one that is meant.
    ///
    /// As with `ssh`, the first host between may have hosts before it by its own configuration, and the others are named by the one that is
    /// meant.
    ///
    /// - Parameters:
    ///   - target: the host.
    ///   - reader: reads the operator's configuration.
    /// - Throws: `FleetError` for a way that a program would have to make, or that leads in a circle.
    public static func way(to target: SSHTarget, by reader: SSHConfigurationReader) throws -> [SSHSettings] {
        var next: SSHTarget? = target
        var way: [SSHSettings] = []
        while let current = next {
            let settings = try reader.settings(for: current.host, user: current.user, port: current.port)
            if let place = settings.proxyCommand {
                throw FleetError(
                    "\(place) has a ProxyCommand make the connection to \(current.host), and no program is run for a configuration; "
                        + "use ProxyJump there, or name an address that is reached from here"
                )
            }
            let between = try settings.jumps.map { try SSHTarget(parsing: $0) }
            let others = try between.dropFirst().map {
                try reader.settings(for: $0.host, user: $0.user, port: $0.port)
            }
            way = others + [settings] + way
            next = between.first
            guard way.count <= mostHops else {
                throw FleetError(
                    "\(target.host) is reached through more than \(mostHops) hosts, or in a circle; see ProxyJump"
                )
            }
        }
        return way
    }

    /// Whether the way leads through another host: addresses that the other end sees are not this host's then.
    var hasDetour: Bool { hops.count > 1 }

    private func connect(_ question: OperatorQuestion) throws -> SSHLogin {
        var last: SSHLogin?
        for (index, hop) in hops.enumerated() {
            let isTarget = index == hops.count - 1
            let socket =
                try last.map { try SSHRelay.start(through: $0, to: hop.host, port: hop.port) }
                ?? Self.socket(to: hop)
            last = try SSHLogin(
                over: socket,
                hop,
                SSHLogin.Circumstances(
                    identity: isTarget ? target.identity : nil,
                    knownHosts: target.knownHosts,
                    fingerprint: isTarget ? target.fingerprint : nil,
                    question: question,
                    answers: answers,
                    note: note
                )
            )
        }
        guard let last else { throw FleetError("\(target.destination) leads nowhere") }
        return last
    }

    private static func socket(to hop: SSHSettings) throws -> Int32 {
        var hints = addrinfo()
        hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
        hints.ai_family = hop.family == "inet" ? AF_INET : hop.family == "inet6" ? AF_INET6 : AF_UNSPEC
        var found: UnsafeMutablePointer<addrinfo>?
        let code = getaddrinfo(hop.host, "\(hop.port)", &hints, &found)
        defer { if let found { freeaddrinfo(found) } }
        guard code == 0 else {
            throw FleetError(
                "\(hop.name) cannot be reached over SSH: \(hop.host) is no host: \(String(cString: gai_strerror(code)))"
            )
        }
        var reason = "it has no address"
        var entry = found
        while let address = entry?.pointee {
            entry = address.ai_next
            let socket = xd_socket(address.ai_family, Int32(SOCK_STREAM.rawValue))
            guard socket >= 0 else { continue }
            if Glibc.connect(socket, address.ai_addr, address.ai_addrlen) == 0 || errno == EINPROGRESS {
                var waiting = pollfd(fd: socket, events: Int16(POLLOUT), revents: 0)
                var failure: Int32 = 0
                var size = socklen_t(MemoryLayout<Int32>.size)
                if poll(&waiting, 1, 15_000) != 1 {
                    reason = "no answer within 15 s"
                } else if getsockopt(socket, SOL_SOCKET, SO_ERROR, &failure, &size) == 0, failure == 0 {
                    var one: Int32 = 1
                    setsockopt(socket, Int32(IPPROTO_TCP), TCP_NODELAY, &one, size)
                    return socket
                } else {
                    reason = String(cString: strerror(failure))
                }
            } else {
                reason = String(cString: strerror(errno))
            }
            close(socket)
        }
        throw FleetError("\(hop.name) cannot be reached over SSH: \(reason)")
    }

    // MARK: commands

    /// Runs a command there. Blocks.
    ///
    /// - Parameters:
    ///   - command: a command line for the shell there.
    ///   - input: what it reads.
    ///   - silence: how long it may say nothing.
    /// - Throws: `FleetError` when the connection is lost, or the command says nothing for too long. What the command itself says is in the result.
    func run(_ command: String, input: [UInt8] = [], silence: Duration = .seconds(120)) throws -> ProgramRun {
        try login.withLock { login in
            // When the connection was lost, another one is made, if that needs no answer.
            if login?.isConnected != true { login = nil }
            let current = try login ?? connect(OperatorQuestion(isBatch: true))
            login = current
            do { return try Self.run(command, input, silence, over: current) } catch {
                login = nil
                throw error
            }
        }
    }

    private static func run(
        _ command: String,
        _ input: [UInt8],
        _ silence: Duration,
        over login: SSHLogin
    ) throws -> ProgramRun {
        guard let channel = ssh_channel_new(login.session) else {
            throw FleetError("There is no memory for a channel to \(login.name)")
        }
        defer { ssh_channel_free(channel) }
        try login.drive("open a channel") { ssh_channel_open_session(channel) }
        try login.drive("run a command") { ssh_channel_request_exec(channel, command) }
        var rest = input[...]
        var hasEnded = false
        var output: [UInt8] = []
        var errors: [UInt8] = []
        var buffer = [UInt8](repeating: 0, count: 32 << 10)
        var heard = ContinuousClock.now
        while true {
            var moved = false
            if !rest.isEmpty {
                let count = rest.prefix(64 << 10).withUnsafeBytes {
                    ssh_channel_write(channel, $0.baseAddress, UInt32($0.count))
                }
                if count > 0 {
                    rest = rest.dropFirst(Int(count))
                    moved = true
                } else if count != 0, count != SSH_AGAIN {
                    // It reads no more; what it says is worth more than that.
                    rest = []
                }
            } else if !hasEnded {
                hasEnded = ssh_channel_send_eof(channel) != SSH_AGAIN
            }
            for isErrors in [Int32(0), 1] {
                let count = ssh_channel_read_nonblocking(channel, &buffer, UInt32(buffer.count), isErrors)
                guard count > 0 else { continue }
                moved = true
                if isErrors == 1 { errors += buffer.prefix(Int(count)) } else { output += buffer.prefix(Int(count)) }
                guard output.count + errors.count <= limit else {
                    throw FleetError("\(login.name) says more than \(limit >> 20) MiB")
                }
            }
            if moved {
                heard = .now
                continue
            }
            guard ContinuousClock.now - heard < silence else {
                throw FleetError(
                    "A command on \(login.name) has said nothing for \(silence); see what it waits for there"
                )
            }
            let code = ssh_channel_get_exit_status(channel)
            if ssh_channel_is_eof(channel) != 0, code >= 0 || ssh_channel_is_closed(channel) != 0 {
                return ProgramRun(
                    code: code >= 0 ? code : 255,
                    output: output,
                    errors: String(decoding: errors, as: UTF8.self)
                )
            }
            try login.wait()
        }
    }
}
