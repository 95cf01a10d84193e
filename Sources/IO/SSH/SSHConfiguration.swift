/// How an SSH server is reached, and who we are to it.
public struct SSHConfiguration: Sendable {
    /// The server's host name or address.
    public var host: String
    /// The server's port.
    public var port: UInt16
    /// The user there.
    public var user: String
    /// The file with the keys of known hosts, in OpenSSH's format. A host that it does not know is refused.
    public var knownHosts: String
    /// The file with our private key, in OpenSSH's format, without a passphrase.
    public var identity: String
    /// The time allowed for the connection, the key exchange, the authentication and the channel.
    public var timeout: Duration

    /// Where the channel leads.
    public enum Target: Sendable, Equatable, CustomStringConvertible {
        /// A TCP connection that the server makes.
        case tcp(host: String, port: UInt16)
        /// The standard input and output of a command on the server.
        case command(String)

        /// The target for messages.
        public var description: String {
            switch self {
            case .tcp(let host, let port): "\(host):\(port)"
            case .command(let command): "'\(command)'"
            }
        }
    }

    /// Makes a configuration.
    public init(
        host: String,
        port: UInt16 = 22,
        user: String,
        knownHosts: String,
        identity: String,
        timeout: Duration = .seconds(15)
    ) {
        self.host = host
        self.port = port
        self.user = user
        self.knownHosts = knownHosts
        self.identity = identity
        self.timeout = timeout
    }
}
