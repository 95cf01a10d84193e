/// How a host is reached over SSH, and who we are to it, after the operator's configuration had its say.
public struct SSHSettings: Sendable, Hashable {
    /// The host's name or address.
    public var host: String
    /// Its port.
    public var port: UInt16
    /// The user there.
    public var user: String
    /// Private keys, in the order in which they are tried.
    public var identities: [String] = []
    /// Certificates for these keys, beside those next to them.
    public var certificates: [String] = []
    /// Whether the agent's other keys are left alone.
    public var isIdentitiesOnly = false
    /// The agent's socket; empty for no agent.
    public var agent: String?
    /// Hosts on the way, the first first; empty for none.
    public var jumps: [String] = []
    /// Further files of known hosts: what the usual ones say of a host comes first.
    public var knownHosts: [String] = []
    /// The name under which the host's key is known; nil for its own.
    public var keyName: String?
    /// Whether an unknown key is refused without a question.
    public var isStrict = false
    /// Whether names are hidden in the file of known hosts.
    public var isHashing = false
    /// Whether nobody is asked.
    public var isBatch = false
    /// Whether keys are tried.
    public var allowsKeys = true
    /// Whether a password is tried.
    public var allowsPassword = true
    /// Whether the server's own questions are answered.
    public var allowsQuestions = true
    /// Whether only IPv4 (`inet`) or IPv6 (`inet6`) is used; `any` for both.
    public var family = "any"
    /// What of the configuration is not done, a sentence each.
    public var notes: [String] = []
    /// Where a program is named that should connect, which is not run; nil when there is none.
    public var proxyCommand: String?

    /// The host under which its key is known, as files of known hosts write it.
    public var knownName: String {
        keyName ?? (port == 22 ? host : "[\(host)]:\(port)")
    }

    /// Both for messages.
    public var name: String { port == 22 ? "\(user)@\(host)" : "\(user)@\(host):\(port)" }
}
