import Fleet
import FoundationEssentials
import Glibc
import IO
import TestSupport
import Testing

/// `crossdock pair` over a real OpenSSH, between hosts in namespaces of their own.
@Suite(.serialized, .timeLimit(.minutes(12)), .enabled(if: geteuid() == 0, "hosts with their own /etc need root"))
struct PairEndToEnd {
    private static func isFresh(_ host: FleetLab.Host) -> Bool {
        ![
            "/etc/pki/crossdock", "/etc/pki/crossdock-ca", "/etc/pki/crossdock.new", FleetFiles.peers,
            "/etc/crossdock/fleet.json",
        ]
        .contains(where: host.has)
    }

    /// The lab of most tests: the operator of host-a knows host-b's key.
    private static func lab() async throws -> FleetLab {
        let lab = try await FleetLab()
        try await lab.serve("host-b")
        try await lab.know(["host-b"], on: "host-a")
        return lab
    }

    @Test func twoHostsArePairedVerifiedAndParted() async throws {
        let lab = try await Self.lab()
        let (a, b) = (lab["host-a"], lab["host-b"])
        let dry = try await lab.pair(on: "host-a", [b.address, "--dry-run"])
        #expect(dry.code == 0 && dry.output.contains("would do: authority: crossdock pki init"), "\(dry.all)")
        #expect(Self.isFresh(a) && Self.isFresh(b))
        let first = try await lab.pair(on: "host-a", [b.address])
        #expect(first.code == 0, "\(first.all)")
        // Without systemd the agents are started by hand, and the operator is told.
        #expect(first.output.contains("start its agent: crossdock destination"), "\(first.output)")
        // No key has left its host.
        let keys = [a, b].map { $0.text("/etc/pki/crossdock/server-key.pem") }
        #expect(keys[0].contains("PRIVATE KEY") && keys[1].contains("PRIVATE KEY") && keys[0] != keys[1])
        #expect(a.has("/etc/pki/crossdock-ca/ca-key.pem") && !b.has("/etc/pki/crossdock-ca"))
        for host in [a, b] {
            #expect(
                host.text(FleetFiles.peers).contains("CN=host-a") && host.text(FleetFiles.peers).contains("CN=host-b")
            )
        }
        try await lab.startAgent("host-a")
        try await lab.startAgent("host-b")
        #expect(lab.agentErrors("host-b").contains("who may send guests is said in \(FleetFiles.peers)"))
        // Again: nothing is made, and each reaches the other.
        let again = try await lab.pair(on: "host-a", [b.address])
        #expect(again.code == 0, "\(again.all)")
        #expect(
            again.output.contains("host-a to host-b: ") && again.output.contains("host-b to host-a: "),
            "\(again.output)"
        )
        #expect(!again.output.contains("certificate"), "\(again.output)")
        #expect([a, b].map { $0.text("/etc/pki/crossdock/server-key.pem") } == keys)
        // No --object, no --tls-creds: the way is there for every command.
        let doctor = try await a.run([Tool.crossdock, "doctor", b.address, "--address", a.address])
        #expect(doctor.output.contains("Guests can move"), "\(doctor.all)")
        let list = try await lab.pair(on: "host-a", ["--list"])
        #expect(list.output.contains("host-b") && list.output.contains("both ways"), "\(list.all)")
        // Parted: who has left is let in no more, from that moment on.
        let undone = try await lab.pair(on: "host-a", ["--undo", "host-b"])
        #expect(undone.code == 0, "\(undone.all)")
        #expect(Self.isFresh(b) && Self.isFresh(a))
        let missing = try await lab.pair(on: "host-a", ["--undo", "host-b"])
        #expect(missing.code == 30 && missing.errors.contains("not paired"), "\(missing.all)")
    }

    @Test func aThirdHostJoinsAndLeavesTheSameFleet() async throws {
        let lab = try await FleetLab(["host-a", "host-b", "host-c"])
        let (a, b, c) = (lab["host-a"], lab["host-b"], lab["host-c"])
        for name in ["host-b", "host-c"] { try await lab.serve(name) }
        try await lab.know(["host-b", "host-c"], on: "host-a")
        // A member that is reached without a question, also when another one joins.
        _ = try await a.shell("printf 'Host *\\n IdentityFile \(lab.directory.file("operator"))\\n' >/root/.ssh/config")
        #expect(try await lab.pair(on: "host-a", [b.address]).code == 0)
        let joined = try await lab.pair(on: "host-a", [c.address])
        #expect(joined.code == 0, "\(joined.all)")
        for host in [a, b, c] { #expect(host.text(FleetFiles.peers).contains("CN=host-c"), "\(host.name)") }
        #expect(!joined.output.contains("authority:"))
        // It leaves while another member cannot be reached: that one is named, and tried again.
        try await lab.stopServing("host-b")
        let undone = try await lab.pair(on: "host-a", ["--undo", "host-c"])
        #expect(undone.code == 0 && undone.output.contains("host-b has not got the new list"), "\(undone.all)")
        #expect(try await lab.pair(on: "host-a", ["--list"]).output.contains("behind"))
        #expect(!a.text(FleetFiles.peers).contains("CN=host-c") && b.text(FleetFiles.peers).contains("CN=host-c"))
        try await lab.serve("host-b")
        let renewed = try await lab.pair(on: "host-a", ["--renew"])
        #expect(renewed.code == 0, "\(renewed.all)")
        #expect(!b.text(FleetFiles.peers).contains("CN=host-c"))
        #expect(!(try await lab.pair(on: "host-a", ["--list"]).output.contains("behind")))
    }

    /// Its operator asks for a password, or has closed SSH: its agent takes the list all the same.
    @Test func aMemberWithoutSSHGetsTheListByItsAgent() async throws {
        let lab = try await FleetLab(["host-a", "host-b", "host-c"])
        let (b, c) = (lab["host-b"], lab["host-c"])
        for name in ["host-b", "host-c"] { try await lab.serve(name) }
        try await lab.know(["host-b", "host-c"], on: "host-a")
        #expect(try await lab.pair(on: "host-a", [b.address]).code == 0)
        try await lab.startAgent("host-b")
        try await lab.stopServing("host-b")
        let joined = try await lab.pair(on: "host-a", [c.address])
        #expect(joined.code == 0 && !joined.output.contains("has not got the new list"), "\(joined.all)")
        #expect(b.text(FleetFiles.peers).contains("CN=host-c"))
        #expect(try await lab.pair(on: "host-a", ["--undo", "host-c"]).code == 0)
        #expect(!b.text(FleetFiles.peers).contains("CN=host-c"))
    }

    @Test func oneWayMeansThatTheOtherHostSendsNothing() async throws {
        let lab = try await Self.lab()
        let (a, b) = (lab["host-a"], lab["host-b"])
        #expect(try await lab.pair(on: "host-a", [b.address, "--one-way"]).code == 0)
        try await lab.startAgent("host-a")
        try await lab.startAgent("host-b")
        let again = try await lab.pair(on: "host-a", [b.address, "--one-way"])
        #expect(again.code == 0 && again.output.contains("host-a to host-b: "), "\(again.all)")
        let back = try await b.run([Tool.crossdock, "doctor", a.address, "--address", "none"])
        #expect(back.code == 24, "\(back.all)")
        // It gets its certificates at the authority's host all the same, and nothing else there.
        try await lab.age("host-b")
        let old = b.text("/etc/pki/crossdock/server-cert.pem")
        let renewed = try await lab.pair(on: "host-b", ["--renew", "--batch"])
        #expect(renewed.code == 0 && renewed.output.contains("renewed, for the same names"), "\(renewed.all)")
        #expect(b.text("/etc/pki/crossdock/server-cert.pem") != old)
        let refused = try await b.run([Tool.crossdock, "doctor", a.address, "--address", "none"])
        #expect(refused.code == 24, "\(refused.all)")
    }

    @Test func aCertificateThatIsAboutToEndIsRenewed() async throws {
        let lab = try await Self.lab()
        let b = lab["host-b"]
        #expect(try await lab.pair(on: "host-a", [b.address]).code == 0)
        try await lab.age("host-b")
        let key = b.text("/etc/pki/crossdock/server-key.pem")
        let renewed = try await lab.pair(on: "host-a", ["--renew", "host-b"])
        #expect(renewed.code == 0 && renewed.output.contains("certificate there"), "\(renewed.all)")
        #expect(!renewed.output.contains("certificate here"))
        #expect(b.text("/etc/pki/crossdock/server-key.pem") != key)
        let checked = try await b.run([Tool.crossdock, "pki", "check", "/etc/pki/crossdock"])
        #expect(checked.code == 0 && !checked.output.contains("expires"), "\(checked.all)")
    }

    // MARK: who is let in, and who is meant

    @Test func aPasswordIsAskedFor() async throws {
        let lab = try await FleetLab()
        try await lab.serve("host-b", password: "open sesame")
        try await lab.know(["host-b"], on: "host-a")
        let address = lab["host-b"].address
        let wrong = try await lab.pair(on: "host-a", [address], key: "stranger", environment: lab.answering("friend"))
        #expect(wrong.code == 30 && wrong.errors.contains("lets nobody in"), "\(wrong.all)")
        let right = try await lab.pair(
            on: "host-a",
            [address],
            key: "stranger",
            environment: lab.answering("open sesame")
        )
        #expect(right.code == 0, "\(right.all)")
    }

    @Test func theAgentsKeysAreUsed() async throws {
        let lab = try await Self.lab()
        let path = lab.directory.path
        let socket = "\(path)/agent.sock"
        let agent = try ChildProcess(["ssh-agent", "-D", "-a", socket])
        try await agent.wait(for: "an agent") { isListening(socket) }
        // More keys than a server wants to see, and the good one is the last.
        let added = try await Tool.run([
            "env", "SSH_AUTH_SOCK=\(socket)", "sh", "-ec",
            """
            cd \(path)
            for key in 1 2 3 4 5 6 7; do ssh-keygen -q -t ed25519 -N '' -f many$key; ssh-add -q many$key; done
            ssh-add -q operator
            """,
        ])
        #expect(added.code == 0, "\(added.all)")
        let address = lab["host-b"].address
        let many = try await lab.pair(
            on: "host-a",
            [address, "--batch"],
            key: "stranger",
            environment: ["SSH_AUTH_SOCK=\(socket)"]
        )
        #expect(many.code == 30 && many.errors.contains("lets nobody in"), "\(many.all)")
        // The configuration says which one it is, by its public part.
        _ = try await lab["host-a"].run(["cp", "\(path)/operator.pub", "/root/.ssh/chosen.pub"])
        for only in ["no", "yes"] {
            try await lab.write(
                "IdentityFile ~/.ssh/chosen\nIdentitiesOnly \(only)\nIdentityAgent \(socket)\n",
                to: "/root/.ssh/config",
                on: "host-a"
            )
            let paired = try await lab.pair(on: "host-a", [address, "--batch"], key: "stranger")
            #expect(paired.code == 0, "\(paired.all)")
        }
        try await lab.write("IdentityAgent none\n", to: "/root/.ssh/config", on: "host-a")
        let none = try await lab.pair(
            on: "host-a",
            [address, "--batch"],
            key: "stranger",
            environment: ["SSH_AUTH_SOCK=\(socket)"]
        )
        #expect(none.code == 30, "\(none.all)")
    }

    @Test func aHostBehindAnotherOneIsReachedByTheOperatorsConfiguration() async throws {
        let lab = try await FleetLab(["host-a", "host-b", "host-j"])
        for name in ["host-b", "host-j"] { try await lab.serve(name) }
        try await lab.know(["host-b", "host-j"], on: "host-a")
        let key = lab.directory.file("operator")
        let configuration = """
            Host behind
                HostName \(lab["host-b"].address)
                User root
                ProxyJump \(lab["host-j"].address)
            Host *
                IdentityFile \(key)
            """
        try await lab.write(configuration, to: "/root/.ssh/config", on: "host-a")
        // What the other end sees is the host between.
        let unknown = try await lab.pair(on: "host-a", ["behind"])
        #expect(unknown.code == 30 && unknown.errors.contains("--own-address"), "\(unknown.all)")
        let paired = try await lab.pair(on: "host-a", ["behind", "--own-address", lab["host-a"].address])
        #expect(paired.code == 0, "\(paired.all)")
        // The host between is recognised as well.
        _ = try await lab["host-a"].shell("sed -i '/^\(lab["host-j"].address) /d' /root/.ssh/known_hosts")
        let between = try await lab.pair(on: "host-a", ["behind"])
        #expect(
            between.code == 30 && between.errors.contains("The key of root@\(lab["host-j"].address)"),
            "\(between.all)"
        )
        #expect(paired.output.contains("CN=host-b, for host-b, \(lab["host-b"].address)"), "\(paired.output)")
    }

    @Test func anUnknownKeyIsRefusedUnlessItsFingerprintIsSaid() async throws {
        let lab = try await FleetLab()
        try await lab.serve("host-b")
        let (a, b) = (lab["host-a"], lab["host-b"])
        let refused = try await lab.pair(on: "host-a", [b.address, "--batch"])
        #expect(refused.code == 30 && refused.errors.contains("is not known here"), "\(refused.all)")
        let wrong = try await lab.pair(
            on: "host-a",
            [b.address, "--fingerprint", "SHA256:" + String(repeating: "A", count: 43)]
        )
        #expect(wrong.code == 30 && wrong.errors.contains("has not the fingerprint"), "\(wrong.all)")
        #expect(Self.isFresh(a) && Self.isFresh(b))
        let shown = try await Tool.run(["ssh-keygen", "-lf", lab.directory.file("host-b.key.pub")])
        let fingerprint = String(shown.output.split(separator: " ")[1])
        let paired = try await lab.pair(on: "host-a", [b.address, "--fingerprint", fingerprint])
        #expect(paired.code == 0, "\(paired.all)")
    }

    @Test func anUnknownKeyIsShownAskedForAndRemembered() async throws {
        let lab = try await FleetLab()
        try await lab.serve("host-b")
        let address = lab["host-b"].address
        let refused = try await lab.pair(on: "host-a", [address], environment: lab.answering("no"))
        #expect(refused.code == 30 && refused.errors.contains("was not accepted"), "\(refused.all)")
        let shown = try await Tool.run(["ssh-keygen", "-lf", lab.directory.file("host-b.key.pub")])
        let fingerprint = String(shown.output.split(separator: " ")[1])
        #expect(try String(contentsOfFile: lab.directory.file("question"), encoding: .utf8).contains(fingerprint))
        let paired = try await lab.pair(on: "host-a", [address], environment: lab.answering(fingerprint))
        #expect(paired.code == 0 && paired.output.contains("is remembered in /root/.ssh/known_hosts"), "\(paired.all)")
        let again = try await lab.pair(on: "host-a", [address, "--batch"])
        #expect(again.code == 0 && !again.output.contains("remembered"), "\(again.all)")
    }

    @Test func theConfigurationRunsNothingAndWeakensNothing() async throws {
        let lab = try await FleetLab()
        try await lab.serve("host-b")
        let (a, b) = (lab["host-a"], lab["host-b"])
        let weak = """
            Host \(b.address)
                StrictHostKeyChecking no
                UserKnownHostsFile /dev/null
                GlobalKnownHostsFile /dev/null
                KnownHostsCommand /usr/bin/touch /root/ran
                PermitLocalCommand yes
                LocalCommand touch /root/ran
            Match exec "touch /root/ran"
                Port 1
            """
        try await lab.write(weak, to: "/root/.ssh/config", on: "host-a")
        let unknown = try await lab.pair(on: "host-a", [b.address])
        #expect(unknown.code == 30 && unknown.errors.contains("is not known here"), "\(unknown.all)")
        for note in [
            "StrictHostKeyChecking no is ignored", "'Match exec' is not carried out", "KnownHostsCommand is not run",
        ] {
            #expect(unknown.output.contains(note), "\(unknown.all)")
        }
        try await lab.know(["host-b"], on: "host-a")
        let paired = try await lab.pair(on: "host-a", [b.address])
        #expect(paired.code == 0, "\(paired.all)")
        // What the usual file says of a host cannot be put out of sight.
        unlink(lab.directory.file("host-b.key"))
        unlink(lab.directory.file("host-b.key.pub"))
        try await lab.serve("host-b")
        let changed = try await lab.pair(on: "host-a", [b.address])
        #expect(changed.code == 30 && changed.errors.contains("another one than the known one"), "\(changed.all)")
        try await lab.write("Host *\n    ProxyCommand touch /root/ran\n", to: "/root/.ssh/config", on: "host-a")
        let command = try await lab.pair(on: "host-a", [b.address])
        #expect(
            command.code == 30 && command.errors.contains("/root/.ssh/config, line 2 has a ProxyCommand"),
            "\(command.all)"
        )
        #expect(!a.has("/root/ran"))
    }

    @Test func aKeyWithAPassphraseACertificateAndAHardwareKey() async throws {
        let lab = try await FleetLab()
        let path = lab.directory.path
        let made = try await Tool.run([
            "sh", "-ec",
            """
            cd \(path)
            ssh-keygen -q -t ed25519 -N '' -f authority
            ssh-keygen -q -t ecdsa -N 'open sesame' -f locked
            ssh-keygen -q -t rsa -N '' -f certified
            ssh-keygen -q -s authority -I operator -n root certified.pub
            cat locked.pub >>operator.pub
            """,
        ])
        #expect(made.code == 0, "\(made.all)")
        try await lab.serve("host-b", more: "TrustedUserCAKeys \(path)/authority.pub")
        try await lab.know(["host-b"], on: "host-a")
        let address = lab["host-b"].address
        let locked = try await lab.pair(on: "host-a", [address], key: "locked")
        #expect(locked.code == 30 && locked.errors.contains("has a passphrase"), "\(locked.all)")
        let certified = try await lab.pair(on: "host-a", [address], key: "certified")
        #expect(certified.code == 0, "\(certified.all)")
        let unlocked = try await lab.pair(
            on: "host-a",
            [address],
            key: "locked",
            environment: lab.answering("open sesame")
        )
        #expect(unlocked.code == 0, "\(unlocked.all)")
        // What ssh-keygen makes of a token: the key's type, and a handle instead of a key.
        func string(_ bytes: [UInt8]) -> [UInt8] {
            (0..<4).map { UInt8(truncatingIfNeeded: bytes.count >> (24 - 8 * $0)) } + bytes
        }
        let type = string(Array("sk-ssh-ed25519@openssh.com".utf8))
        let none = string(Array("none".utf8))
        let body =
            Array("openssh-key-v1\0".utf8) + none + none + string([]) + [0, 0, 0, 1] + string(type) + string(type)
        let text = "-----BEGIN OPENSSH PRIVATE KEY-----\n\(Base64.encode(body))\n-----END OPENSSH PRIVATE KEY-----\n"
        try DurableFile.write(Array(text.utf8), to: "\(path)/token")
        let token = try await lab.pair(on: "host-a", [address], key: "token")
        #expect(token.code == 30 && token.errors.contains("hardware token"), "\(token.all)")
    }

    /// The configuration may say what it likes.
    @Test func aChangedKeyStopsEverything() async throws {
        let lab = try await Self.lab()
        let (a, b) = (lab["host-a"], lab["host-b"])
        unlink(lab.directory.file("host-b.key"))
        unlink(lab.directory.file("host-b.key.pub"))
        try await lab.serve("host-b")
        try await lab.write("Host *\n    StrictHostKeyChecking no\n", to: "/root/.ssh/config", on: "host-a")
        for more in [[], ["--batch"], ["--fingerprint", "SHA256:" + String(repeating: "A", count: 43)]] {
            let refused = try await lab.pair(on: "host-a", [b.address] + more)
            #expect(refused.code == 30 && refused.errors.contains("another one than the known one"), "\(refused.all)")
        }
        #expect(Self.isFresh(a) && Self.isFresh(b))
    }

    @Test func whoMayNotBecomeRootIsToldSo() async throws {
        let lab = try await FleetLab()
        try await lab.serve("host-b")
        try await lab.know(["host-b"], on: "host-a")
        let made = try await lab["host-b"].shell("useradd -M -d / -s /bin/sh visitor && usermod -p '*' visitor")
        #expect(made.code == 0, "\(made.all)")
        let refused = try await lab.pair(on: "host-a", ["visitor@\(lab["host-b"].address)"])
        #expect(refused.code == 30 && refused.errors.contains("is not root"), "\(refused.all)")
    }

    @Test func aHostWithoutCrossdockIsToldHowToGetIt() async throws {
        let lab = try await FleetLab()
        try await lab.serve("host-b", path: "/usr/sbin:/usr/bin:/sbin:/bin")
        try await lab.know(["host-b"], on: "host-a")
        let refused = try await lab.pair(on: "host-a", [lab["host-b"].address])
        #expect(refused.code == 30 && refused.errors.contains("apt-get install ./crossdock_"), "\(refused.all)")
    }

    @Test func aHostOfAnotherFleetIsLeftAlone() async throws {
        let lab = try await Self.lab()
        let (a, b) = (lab["host-a"], lab["host-b"])
        let made = try await b.shell(
            "\(Tool.crossdock) pki init /etc/pki/other && \(Tool.crossdock) pki issue /etc/pki/other /etc/pki/crossdock host-b"
        )
        #expect(made.code == 0, "\(made.all)")
        let before = b.text("/etc/pki/crossdock/server-cert.pem")
        let refused = try await lab.pair(on: "host-a", [b.address])
        #expect(refused.code == 30 && refused.errors.contains("belongs to another fleet"), "\(refused.all)")
        #expect(Self.isFresh(a) && b.text("/etc/pki/crossdock/server-cert.pem") == before)
    }

    /// Certificates that were made by hand become a fleet's.
    @Test func anAuthorityInAnotherPlaceIsUsedAndFoundAgain() async throws {
        let lab = try await Self.lab()
        let (a, b) = (lab["host-a"], lab["host-b"])
        let made = try await a.shell(
            "\(Tool.crossdock) pki init /root/ca && \(Tool.crossdock) pki issue /root/ca /etc/pki/crossdock host-a \(a.address)"
        )
        #expect(made.code == 0, "\(made.all)")
        let before = a.text("/etc/pki/crossdock/server-cert.pem")
        let foreign = try await lab.pair(on: "host-a", [b.address])
        #expect(foreign.code == 30 && foreign.errors.contains("whose key is on another host"), "\(foreign.all)")
        let paired = try await lab.pair(on: "host-a", [b.address, "--ca", "/root/ca"])
        #expect(paired.code == 0 && !paired.output.contains("authority:"), "\(paired.all)")
        #expect(!paired.output.contains("certificate here") && a.text("/etc/pki/crossdock/server-cert.pem") == before)
        #expect(b.text("/etc/pki/crossdock/ca-cert.pem") == a.text("/root/ca/ca-cert.pem"))
        // What comes later need not be told where it is.
        let renewed = try await lab.pair(on: "host-a", ["--renew"])
        #expect(renewed.code == 0 && renewed.output.contains("services"), "\(renewed.all)")
        let undone = try await lab.pair(on: "host-a", ["--undo", "host-b"])
        #expect(undone.code == 0, "\(undone.all)")
        #expect(Self.isFresh(b) && !a.has("/etc/pki/crossdock-ca"))
        // What no pairing has made stays.
        #expect(a.text("/etc/pki/crossdock/server-cert.pem") == before && a.has("/root/ca/ca-key.pem"))
        // One that is not there is made there.
        let fresh = try await FleetLab()
        try await fresh.serve("host-b")
        try await fresh.know(["host-b"], on: "host-a")
        let other = try await fresh.pair(on: "host-a", [fresh["host-b"].address, "--ca", "/root/new"])
        #expect(other.code == 0 && other.output.contains("authority: /root/new, whose key stays here"), "\(other.all)")
    }

    // MARK: in the middle

    /// The other host refuses one step, or is lost in it: what was done before is undone, or named.
    @Test(arguments: ["certify", "list", "serve"])
    func aStepThatFailsUndoesThoseBefore(_ step: String) async throws {
        let lab = try await FleetLab()
        let (a, b) = (lab["host-a"], lab["host-b"])
        let tools = lab.directory.directory("tools")
        // A Crossdock that does everything but this.
        let script = """
            #!/bin/sh
            [ "$1" = pair-member ] || exec \(Tool.crossdock) "$@"
            order=$(cat)
            case "$order" in *'"\(step)"'*) echo 'no space left on device' >&2; exit 1 ;; esac
            printf '%s' "$order" | \(Tool.crossdock) "$@"
            """
        try DurableFile.write(Array(script.utf8), to: "\(tools)/crossdock", mode: 0o755)
        try await lab.serve("host-b", path: "\(tools):/usr/sbin:/usr/bin:/sbin:/bin")
        try await lab.know(["host-b"], on: "host-a")
        let failed = try await lab.pair(on: "host-a", [b.address])
        #expect(failed.code == 31 && failed.errors.contains("no space left on device"), "\(failed.all)")
        #expect(failed.errors.contains("What had been done was undone"))
        #expect(Self.isFresh(a) && Self.isFresh(b))
        #expect(try await lab.pair(on: "host-a", ["--list"]).output.contains("paired with none"))
    }

    @Test(arguments: ["certify", "list", "serve"])
    func aHostThatIsLostInTheMiddleIsNamedAndUndoneLater(_ step: String) async throws {
        let lab = try await FleetLab()
        let (a, b) = (lab["host-a"], lab["host-b"])
        let tools = lab.directory.directory("tools")
        let flag = lab.directory.file("lost")
        // The host is gone from one order to the next.
        let script = """
            #!/bin/sh
            [ "$1" = pair-member ] || exec \(Tool.crossdock) "$@"
            order=$(cat)
            case "$order" in *'"\(step)"'*) if [ -e \(flag) ]; then ip link set eth0 down; exit 1; fi ;; esac
            printf '%s' "$order" | \(Tool.crossdock) "$@"
            """
        try DurableFile.write(Array(script.utf8), to: "\(tools)/crossdock", mode: 0o755)
        try DurableFile.write([], to: flag)
        try await lab.serve("host-b", path: "\(tools):/usr/sbin:/usr/bin:/sbin:/bin")
        try await lab.know(["host-b"], on: "host-a")
        let failed = try await lab.pair(on: "host-a", [b.address])
        #expect(failed.code == 32 && failed.errors.contains("crossdock pair --undo host-b"), "\(failed.all)")
        #expect(try await lab.pair(on: "host-a", ["--list"]).output.contains("interrupted"))
        // Nobody is let in whom the operator believes not to be.
        #expect(!a.text(FleetFiles.peers).contains("CN=host-b"))
        unlink(flag)
        #expect(try await b.shell("ip link set eth0 up").code == 0)
        // The next attempt undoes what is left of this one, and pairs.
        let paired = try await lab.pair(on: "host-a", [b.address])
        #expect(paired.code == 0 && paired.output.contains("interrupted; it is undone first"), "\(paired.all)")
        #expect(b.text(FleetFiles.peers).contains("CN=host-a"))
        #expect(try await lab.pair(on: "host-a", ["--undo", b.address]).code == 0)
        #expect(Self.isFresh(a) && Self.isFresh(b))
    }
}
