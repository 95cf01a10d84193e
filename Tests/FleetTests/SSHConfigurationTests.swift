import Fleet
import FoundationEssentials
import Glibc
import IO
import TestSupport
import Testing

/// What of OpenSSH's configuration counts, and what is never done for it.
struct SSHConfigurationTests {
    private let directory: TestDirectory

    init() throws { directory = try TestDirectory() }

    private func write(_ text: String, _ name: String = "config", mode: UInt32 = 0o600) throws {
        try DurableFile.write(Array(text.utf8), to: directory.file(name), mode: mode)
    }

    private var reader: SSHConfigurationReader {
        SSHConfigurationReader(
            .init(home: "/home/op", user: "op", number: getuid(), hostName: "here.example"),
            files: [directory.file("config"), directory.file("system")]
        )
    }

    private func settings(_ host: String, _ text: String, user: String? = nil, port: UInt16? = nil) throws
        -> SSHSettings
    {
        try write(text)
        return try reader.settings(for: host, user: user, port: port)
    }

    @Test func anAliasHasItsNamePortUserKeyAndJumpHost() throws {
        let found = try settings(
            "web",
            """
            # The fleet
            Host web db
                HostName %h.example.org
                Port=2222
                User "admin"
                IdentityFile ~/.ssh/%r-key   # for this
                IdentityFile = /etc/keys/%h
                ProxyJump jump@gate:2200,inner
            Host *
                User nobody
                Port 1
            """
        )
        #expect(found.host == "web.example.org" && found.port == 2222 && found.user == "admin")
        #expect(found.identities == ["/home/op/.ssh/admin-key", "/etc/keys/web.example.org"])
        #expect(found.jumps == ["jump@gate:2200", "inner"])
        #expect(found.knownName == "[web.example.org]:2222")
    }

    @Test func whatTheOperatorSaysComesFirst() throws {
        let found = try settings("web", "Host *\n  User nobody\n  Port 1\n", user: "root", port: 22)
        #expect(found.user == "root" && found.port == 22)
    }

    @Test func withoutAConfigurationTheUsualKeysAreTried() throws {
        let found = try reader.settings(for: "web")
        #expect(found.host == "web" && found.port == 22 && found.user == "op")
        #expect(found.identities.contains("/home/op/.ssh/id_ed25519"))
    }

    @Test func theFirstValueCountsAndTheSystemsFileComesLast() throws {
        try write("Host *\n  User system\n  ProxyJump gate\n", "system")
        let found = try settings("web", "User first\nHost web\n  User second\n")
        #expect(found.user == "first" && found.jumps == ["gate"])
        #expect(try settings("web", "ProxyJump none\n").jumps.isEmpty)
    }

    @Test(arguments: [("a.lab", true), ("b.lab", false), ("a.lab.org", false), ("A.LAB", true)])
    func patternsAndTheirNegation(_ host: String, _ counts: Bool) throws {
        #expect(try settings(host, "Host *.lab !b.*\n  User yes\n").user == (counts ? "yes" : "op"))
    }

    @Test func filesAreIncludedWhereTheyStand() throws {
        try write("Host web\n  Port 2022\n", "10-web")
        try write("Host *\n  User included\n", "20-all")
        let text = "Host other\n  Include 20-all\nHost *\n  Include \(directory.path)/?0-*\n  User late\n"
        let found = try settings("web", text)
        #expect(found.port == 2022 && found.user == "included")
        // A block of an included file ends with it.
        #expect(try settings("db", "Include 10-web\nUser after\n").user == "after")
        #expect(throws: FleetError.self) { try settings("web", "Include config\n") }
    }

    @Test func matchKnowsHostsAndUsersAndTheFinalReading() throws {
        let text = """
            Host web
                HostName web.example.org
            Match host *.example.org user op
                Port 2222
            Match originalhost web localuser op !user root
                IdentitiesOnly yes
            Match host web
                User wrong
            Match final host web.example.org
                HostKeyAlias final
            Match all
                ProxyJump gate
            """
        let found = try settings("web", text)
        #expect(found.port == 2222 && found.isIdentitiesOnly && found.user == "op")
        #expect(found.keyName == "final" && found.jumps == ["gate"])
    }

    @Test func matchExecIsNotRunAndItIsSaid() throws {
        let proof = directory.file("ran")
        let text = "Match host web exec \"touch \(proof)\"\n  User wrong\nHost *\n  Port 24\n"
        let found = try settings("web", text)
        #expect(found.user == "op" && found.port == 24 && !DurableFile.exists(proof))
        #expect(found.notes.count == 1 && found.notes[0].contains("line 1: 'Match exec' is not carried out"))
        // Where it would have made no difference there is nothing to say.
        #expect(try settings("db", text).notes.isEmpty)
    }

    @Test func aProxyCommandIsNamedAndAnEarlierJumpHostComesFirst() throws {
        let text = "Host web\n  ProxyCommand nc %h %p\n  ProxyJump gate\n"
        let found = try settings("web", text)
        #expect(found.proxyCommand?.hasSuffix("line 2") == true && found.jumps.isEmpty)
        #expect(try settings("web", "ProxyJump gate\nProxyCommand nc %h %p\n").jumps == ["gate"])
        #expect(try settings("web", "ProxyCommand none\n").proxyCommand == nil)
        let target = try SSHTarget(parsing: "web")
        try write(text)
        #expect(throws: FleetError.self) { try SSHConnection.way(to: target, by: reader) }
    }

    @Test func hostKeyCheckingIsMadeStricterAndNeverWeaker() throws {
        let weak = try settings(
            "web",
            "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null ~/.ssh/fleet\nKnownHostsCommand /bin/true\n"
        )
        #expect(!weak.isStrict && weak.notes.count == 2)
        #expect(weak.notes[0].contains("StrictHostKeyChecking no is ignored"))
        #expect(weak.notes[1].contains("KnownHostsCommand is not run"))
        // Files are added to the usual ones.
        #expect(weak.knownHosts == ["/dev/null", "/home/op/.ssh/fleet"])
        #expect(try settings("web", "StrictHostKeyChecking yes\n").isStrict)
    }

    @Test func aFileThatOthersMayWriteIsNotBelieved() throws {
        try write("Host *\n  User wrong\n", mode: 0o666)
        chmod(directory.file("config"), 0o666)
        #expect(throws: FleetError.self) { try reader.settings(for: "web") }
    }

    @Test(arguments: ["Port x\n", "Host web\n  Port 0\n", "User \"open\n", "HostName -oProxyCommand=x\n", "User\n"])
    func whatIsDamagedIsSaid(_ text: String) throws {
        #expect(throws: FleetError.self) { try settings("web", text) }
    }

    @Test func theWayLeadsThroughTheJumpHostsOfTheFirstOne() throws {
        try write(
            """
            Host web
                ProxyJump gate,inner
            Host gate
                ProxyJump outer
            Host inner
                ProxyJump none
                Port 23
            """
        )
        let way = try SSHConnection.way(to: SSHTarget(parsing: "root@web"), by: reader)
        #expect(way.map(\.name) == ["op@outer", "op@gate", "op@inner:23", "root@web"])
        try write("Host *\n  ProxyJump gate\n")
        #expect(throws: FleetError.self) { try SSHConnection.way(to: SSHTarget(parsing: "web"), by: reader) }
    }
}

/// The keys of hosts, in OpenSSH's files.
struct KnownHostsTests {
    private static let hosts = KnownHosts(
        text: """
            # lab
            host-b,192.0.2.2 ssh-ed25519 AAAAkey1 comment
            *.lab,!bad.lab ssh-rsa AAAAkey2
            [host-b]:2222 ecdsa-sha2-nistp256 AAAAkey3
            @revoked * ssh-ed25519 AAAAlost
            @cert-authority *.fleet ssh-ed25519 AAAAroot
            """
    )

    @Test(
        arguments: [
            ("host-b", "AAAAkey1", .known), ("192.0.2.2", "AAAAkey1", .known), ("a.lab", "AAAAkey2", .known),
            ("bad.lab", "AAAAkey2", .unknown(isCertified: false)), ("host-b", "AAAAkey2", .changed("line:2")),
            ("[host-b]:2222", "AAAAkey3", .known), ("[host-b]:2222", "AAAAkey1", .changed("line:4")),
            ("host-b", "AAAAlost", .revoked("line:5")), ("new", "AAAAlost", .revoked("line:5")),
            ("new", "AAAAkey1", .unknown(isCertified: false)), ("a.fleet", "AAAAroot", .unknown(isCertified: true)),
        ] as [(String, String, KnownHosts.Verdict)]
    )
    func aKeyIsJudged(_ name: String, _ key: String, _ verdict: KnownHosts.Verdict) {
        #expect(Self.hosts.judge(name, key) == verdict)
    }

    @Test func theTypesOfKnownKeysAreAskedFor() {
        #expect(Self.hosts.types(of: "host-b") == ["ssh-ed25519"] && Self.hosts.types(of: "new").isEmpty)
    }

    /// ssh-keygen hides the names, and finds what we have hidden.
    @Test func hiddenNamesAreOpenSSHs() async throws {
        let directory = try TestDirectory()
        let file = directory.file("hosts")
        let made = try await Tool.run([
            "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory.file("key"),
        ])
        #expect(made.code == 0, "\(made.all)")
        let words = try String(contentsOfFile: directory.file("key.pub"), encoding: .utf8).split(separator: " ")
        try DurableFile.write(Array("host-b \(words[0]) \(words[1])\n".utf8), to: file)
        #expect(try await Tool.run(["ssh-keygen", "-q", "-H", "-f", file]).code == 0)
        #expect(try !String(contentsOfFile: file, encoding: .utf8).contains("host-b"))
        let read = try KnownHosts(reading: [file, directory.file("none")])
        #expect(read.judge("host-b", String(words[1])) == .known)
        #expect(read.judge("host-c", String(words[1])) == .unknown(isCertified: false))
        let own = try KnownHosts.line(
            "[host-c]:2222",
            type: String(words[0]),
            key: String(words[1]),
            salt: (0..<20).map { $0 }
        )
        try DurableFile.write(Array(own.utf8), to: file)
        let found = try await Tool.run(["ssh-keygen", "-F", "[host-c]:2222", "-f", file])
        #expect(found.code == 0 && !own.contains("host-c"), "\(found.all)")
    }
}
