internal import IO

/// What is found where an SSH connection leads, before Crossdock is asked: who is logged in, and what is installed.
struct RemoteLogin: Sendable {
    /// Put before commands that need root.
    let privilege: String
    /// Crossdock's version; nil when it is not installed.
    let version: String?
    /// The Debian release, `debian 12`.
    let system: String
    /// The architecture of its packages.
    let architecture: String
    /// The address that SSH reached; nil when that is not told.
    let address: String?
    /// The address that SSH came from; nil when that is not told.
    let source: String?

    private static let script = """
        if [ "$(id -u)" = 0 ]; then echo privilege=root; elif sudo -n true 2>/dev/null; then echo privilege=sudo; fi
        echo "connection=$SSH_CONNECTION"
        echo "version=$(crossdock --version 2>/dev/null)"
        echo "architecture=$(dpkg --print-architecture 2>/dev/null || uname -m)"
        if [ -r /etc/os-release ]; then . /etc/os-release; echo "system=$ID $VERSION_ID"; fi
        """

    /// Looks. Blocks.
    ///
    /// - Throws: `FleetError` when it is neither root nor may become it.
    init(over connection: SSHConnection, _ host: String) throws {
        let run = try connection.run("sh -s", input: Array(Self.script.utf8))
        var found: [String: String] = [:]
        for line in String(decoding: run.output, as: UTF8.self).split(whereSeparator: \.isNewline) {
            let parts = line.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            if parts.count == 2 { found[String(parts[0])] = String(parts[1]) }
        }
        switch found["privilege"] {
        case "root": privilege = ""
        case "sudo": privilege = "sudo -n "
        default:
            throw FleetError(
                "Who is logged in to \(host) is not root and may not become it without a password: log in as root, or allow "
                    + "'sudo -n' there"
            )
        }
        let words = (found["version"] ?? "").split(separator: " ")
        version = words.count == 2 && words[0] == "crossdock" ? String(words[1]) : nil
        system = found["system"] ?? ""
        architecture = found["architecture"] ?? ""
        let connection = (found["connection"] ?? "").split(separator: " ").map(String.init)
        source = connection.count == 4 ? connection[0] : nil
        address = connection.count == 4 ? connection[2] : nil
    }
}
