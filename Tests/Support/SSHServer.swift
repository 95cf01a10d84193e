internal import FoundationEssentials
internal import Glibc

/// OpenSSH's sshd on a port of its own, with keys of its own; it ends with the process that started it.
public final class SSHServer: Sendable {
    /// The port on 127.0.0.1.
    public let port: UInt16
    /// The user whom it lets in.
    public let user: String
    /// The directory with `known_hosts`, the good key `id` and `stranger`, which it does not know.
    public let directory: TestDirectory
    private let process: ChildProcess

    /// The one that all tests of a process share.
    public static let shared = Task { try await SSHServer() }

    private init() async throws {
        directory = try TestDirectory()
        let path = directory.path
        user = String(cString: getpwuid(getuid()).pointee.pw_name)
        // sshd wants this directory when it runs as root.
        if getuid() == 0 { mkdir("/run/sshd", 0o755) }
        for key in ["host", "id", "stranger", "other"] {
            let made = try await Tool.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "\(path)/\(key)"])
            guard made.code == 0 else { throw TestFailure("ssh-keygen: \(made.all)") }
        }
        port = try await freePort()
        let configuration = """
            Port \(port)
            ListenAddress 127.0.0.1
            HostKey \(path)/host
            AuthorizedKeysFile \(path)/id.pub
            PidFile none
            StrictModes no
            UsePAM no
            PasswordAuthentication no
            KbdInteractiveAuthentication no
            PermitRootLogin prohibit-password
            AllowTcpForwarding yes
            MaxStartups 100:30:200
            MaxSessions 100
            """
        try configuration.write(toFile: "\(path)/config", atomically: true, encoding: .utf8)
        let key = try String(contentsOfFile: "\(path)/host.pub", encoding: .utf8)
        let other = try String(contentsOfFile: "\(path)/other.pub", encoding: .utf8)
        try "[127.0.0.1]:\(port) \(key)".write(toFile: "\(path)/known_hosts", atomically: true, encoding: .utf8)
        try "[127.0.0.1]:\(port) \(other)".write(toFile: "\(path)/wrong_hosts", atomically: true, encoding: .utf8)
        try "".write(toFile: "\(path)/no_hosts", atomically: true, encoding: .utf8)
        process = try ChildProcess([
            "setpriv", "--pdeathsig", "KILL", "/usr/sbin/sshd", "-D", "-e", "-f", "\(path)/config",
        ])
        try await process.wait(for: "sshd") { process.errors.contains("Server listening on 127.0.0.1") }
    }
}
