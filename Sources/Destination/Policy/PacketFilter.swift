internal import CLinux
internal import Emulator
internal import Glibc
internal import IO

/// A table of nftables that keeps the users of guests from loopback and link-local addresses of this host.
///
/// It is about a whole range of users, belongs to no process, and stays: guests outlive their agent. TCP connections are recognised by
/// their first segment, so the kernel needs to track none, and answers to whoever connected to a guest pass.
struct PacketFilter: Sendable {
    /// The users.
    let users: ClosedRange<UInt32>
    /// Name servers that guests may ask, in spite of their addresses.
    let nameServers: [HostAddress]

    /// The name of the table.
    var table: String { "crossdock_guests_\(users.lowerBound)_\(users.upperBound)" }

    /// The name servers of a `resolv.conf` whose addresses guests are kept from otherwise.
    static func nameServers(in text: String) -> [HostAddress] {
        text.split(separator: "\n").compactMap { line in
            let words = line.split { $0 == " " || $0 == "\t" }
            guard words.count >= 2, words[0] == "nameserver" else { return nil }
            return HostAddress(String(words[1])).flatMap { $0.isGuarded ? $0 : nil }
        }
    }

    /// What the program `nft` gets. In one transaction it replaces what an earlier agent has left.
    var ruleset: String {
        let user = "meta skuid \(users.lowerBound)-\(users.upperBound)"
        let questions = nameServers.map { server in
            "    \(server.isIPv4 ? "ip" : "ip6") daddr \(server.text) meta l4proto { tcp, udp } th dport 53 accept\n"
        }
        return """
            table inet \(table)
            delete table inet \(table)
            table inet \(table) {
              chain output {
                type filter hook output priority filter; policy accept;
                ip daddr { 127.0.0.0/8, 169.254.0.0/16 } \(user) jump guests
                ip6 daddr { ::1, fe80::/10 } \(user) jump guests
              }
              chain guests {
                tcp flags & (syn | ack) != syn accept
            \(questions.joined())    reject with icmpx type admin-prohibited
              }
            }

            """
    }

    /// Installs it. Blocks.
    ///
    /// - Throws: `GuestError` that says why it cannot be.
    func install() throws {
        let (code, words) = try Self.run(["-f", "-"], input: ruleset)
        guard code == 0 else {
            let line = words.split(separator: "\n").first.map(String.init) ?? "it ended with \(code)"
            throw GuestError("'nft' does not install its table: \(line)")
        }
    }

    /// Whether an earlier agent has left it. Blocks.
    var isInstalled: Bool { (try? Self.run(["list", "table", "inet", table], input: "").code) == 0 }

    /// Runs nft with an input that fits into a pipe.
    private static func run(_ words: [String], input: String) throws -> (code: Int32, words: String) {
        let places = ["/usr/sbin/nft", "/sbin/nft"]
        guard let program = EmulatorProcess.find("nft") ?? places.first(where: { access($0, X_OK) == 0 }) else {
            throw GuestError("the program 'nft' is not installed (package nftables)")
        }
        let arguments = [program] + words
        var given: [Int32] = [0, 0]
        var said: [Int32] = [0, 0]
        guard xd_pipe(&given) == 0 else { throw FileError.system("make a pipe", errno) }
        guard xd_pipe(&said) == 0 else {
            let number = errno
            for descriptor in given { close(descriptor) }
            throw FileError.system("make a pipe", number)
        }
        var argv = arguments.map { strdup($0) } + [nil]
        let child = xd_spawn_child(&argv, environ, nil, given[0], said[1], said[1])
        let number = errno
        for pointer in argv { free(pointer) }
        close(given[0])
        close(said[1])
        defer { close(said[0]) }
        guard child > 0 else {
            close(given[1])
            throw FileError.system("start \(program)", number)
        }
        let text = Array(input.utf8)
        let written = write(given[1], text, text.count)
        close(given[1])
        var words: [UInt8] = []
        var buffer = [UInt8](repeating: 0, count: 4096)
        while true {
            let count = read(said[0], &buffer, buffer.count)
            if count < 0, errno == EINTR { continue }
            guard count > 0 else { break }
            words += buffer.prefix(count)
        }
        var status: Int32 = 0
        while waitpid(child, &status, 0) < 0, errno == EINTR {}
        guard written == text.count else { throw GuestError("'nft' does not read its table") }
        return (xd_exit_code(status), String(decoding: words, as: UTF8.self))
    }
}
