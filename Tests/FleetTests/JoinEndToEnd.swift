import Fleet
import FoundationEssentials
import Glibc
import IO
import TestSupport
import Testing

/// `crossdock pair --token` on one host and `--join` on another, which have no SSH.
@Suite(.serialized, .timeLimit(.minutes(12)), .enabled(if: geteuid() == 0, "hosts with their own /etc need root"))
struct JoinEndToEnd {
    private static func isFresh(_ host: FleetLab.Host) -> Bool {
        ![
            "/etc/pki/crossdock", "/etc/pki/crossdock-ca", "/etc/pki/crossdock.new", FleetFiles.peers,
            "/etc/crossdock/fleet.json", "/var/lib/crossdock/joined.json",
        ]
        .contains(where: host.has)
    }

    /// A host that waits with a token.
    private struct Waiter {
        let process: ChildProcess
        let token: String
    }

    private static func wait(_ lab: FleetLab, _ words: [String] = []) async throws -> Waiter {
        let process = try ChildProcess(
            lab["host-a"].command(
                [Tool.crossdock, "pair", "--token", "host-b", "--address", lab["host-b"].address] + words
            )
        )
        func token() -> String? {
            process.output.split(whereSeparator: \.isWhitespace).first { $0.hasPrefix("crossdock-join-1:") }.map(
                String.init
            )
        }
        try await process.wait(for: "a token") { token() != nil && process.output.hasSuffix("\n\n") }
        return Waiter(process: process, token: token() ?? "")
    }

    private static func join(_ lab: FleetLab, _ token: String, on host: String = "host-b", _ words: [String] = [])
        async throws -> ToolResult
    {
        try await lab.write(token + "\n", to: "/root/token", on: host)
        return try await lab[host].shell(
            "setsid -w \(Tool.crossdock) pair --join \(words.joined(separator: " ")) </root/token"
        )
    }

    @Test func aHostJoinsOnceAndGuestsMoveThereWithoutAnythingElse() async throws {
        let lab = try await FleetLab()
        let (a, b) = (lab["host-a"], lab["host-b"])
        let waiter = try await Self.wait(lab)
        let joined = try await Self.join(lab, waiter.token)
        #expect(joined.code == 0 && joined.output.contains("this host is a member"), "\(joined.all)")
        let waited = try await waiter.process.finish()
        #expect(waited.code == 0 && waited.output.contains("host-b is a member"), "\(waited.all)")
        let keys = [a, b].map { $0.text("/etc/pki/crossdock/server-key.pem") }
        #expect(keys[0].contains("PRIVATE KEY") && keys[1].contains("PRIVATE KEY") && keys[0] != keys[1])
        #expect(a.has("/etc/pki/crossdock-ca/ca-key.pem") && !b.has("/etc/pki/crossdock-ca"))
        for host in [a, b] {
            #expect(
                host.text(FleetFiles.peers).contains("CN=host-a") && host.text(FleetFiles.peers).contains("CN=host-b")
            )
        }
        let list = try await lab.pair(on: "host-b", ["--list"])
        #expect(
            list.output.contains("host-a has its authority") && list.output.contains("sends and takes"),
            "\(list.all)"
        )
        // Once, and the port is closed.
        let again = try await Self.join(lab, waiter.token)
        #expect(again.code == 30 && again.errors.contains("Nobody waits for this token"), "\(again.all)")
        #expect(!(try await a.shell("ss -Hltn").output.contains(":10812")))

        try await lab.startAgent("host-a")
        try await lab.startAgent("host-b")
        let made = try await a.shell(
            "mkdir -p /root/images && truncate -s 8M /root/images/disk.raw && \(Tool.crossdock) guest start web1 -- "
                + "qemu-system-x86_64 -machine pc,accel=tcg -m 64 -nodefaults -display none "
                + "-drive file=/root/images/disk.raw,format=raw,if=virtio"
        )
        #expect(made.code == 0, "\(made.all)")
        let moved = try await a.run([Tool.crossdock, "migrate", "web1", b.address], seconds: 120)
        #expect(moved.code == 0, "\(moved.all)")
        let there = try await b.run([Tool.crossdock, "guest", "list"])
        #expect(there.output.contains("web1") && there.output.contains("running"), "\(there.all)")
        let stopped = try await b.run([Tool.crossdock, "guest", "stop", "web1", "--force"])
        if stopped.code != 0 { _ = try await b.run([Tool.crossdock, "guest", "stop", "web1"]) }

        // The end of it, on both hosts.
        let undone = try await lab.pair(on: "host-a", ["--undo", "host-b"])
        #expect(undone.code == 0 && undone.output.contains("'crossdock pair --undo host-a' there"), "\(undone.all)")
        let left = try await lab.pair(on: "host-b", ["--undo", "host-a"])
        #expect(left.code == 0 && Self.isFresh(b), "\(left.all)")
    }

    @Test func whoHasAnotherSecretIsRefusedAndTheTokenStaysGood() async throws {
        let lab = try await FleetLab()
        let waiter = try await Self.wait(lab)
        var wrong = try JoinToken(parsing: waiter.token)
        wrong.secret = JoinToken.makeSecret()
        let refused = try await Self.join(lab, try wrong.text)
        #expect(refused.code == 30 && refused.errors.contains("does not accept this token"), "\(refused.all)")
        // Tries are limited; the good one is let through when its turn comes.
        for _ in 0..<6 {
            let more = try await Self.join(lab, try wrong.text)
            #expect(more.code == 30, "\(more.all)")
        }
        #expect(Self.isFresh(lab["host-b"]))
        try await eventually(seconds: 30, "the token is accepted") {
            try await Self.join(lab, waiter.token).code == 0
        }
        #expect(try await waiter.process.finish().code == 0)
    }

    @Test func anotherHostCannotUseIt() async throws {
        let lab = try await FleetLab(["host-a", "host-b", "host-c"])
        let waiter = try await Self.wait(lab)
        let named = try await Self.join(lab, waiter.token, on: "host-c")
        #expect(named.code == 30 && named.errors.contains("The token is for 'host-b'"), "\(named.all)")
        // It may say what it likes: the token is for the other's addresses.
        let placed = try await Self.join(lab, waiter.token, on: "host-c", ["--own-name", "host-b"])
        #expect(placed.code == 30 && placed.errors.contains("comes from \(lab["host-c"].address)"), "\(placed.all)")
        // Nor under another name at the right address.
        var renamed = try JoinToken(parsing: waiter.token)
        renamed.host = "host-x"
        let other = try await Self.join(lab, try renamed.text, ["--own-name", "host-x"])
        #expect(other.code == 30, "\(other.all)")
        // A waiter with another authority than the token's is not believed.
        var pinned = try JoinToken(parsing: waiter.token)
        pinned.authority = "SHA256:" + String(repeating: "ab", count: 32)
        let foreign = try await Self.join(lab, try pinned.text)
        #expect(foreign.code == 31, "\(foreign.all)")
        #expect(waiter.process.output.contains("not the one that the token names"), "\(waiter.process.output)")
        #expect(Self.isFresh(lab["host-b"]) && Self.isFresh(lab["host-c"]))
        #expect(try await Self.join(lab, waiter.token).code == 0)
        #expect(try await waiter.process.finish().code == 0)
    }

    @Test func aTokenEndsWithItsTime() async throws {
        let lab = try await FleetLab()
        let waiter = try await Self.wait(lab, ["--expires", "1s"])
        let waited = try await waiter.process.finish()
        #expect(waited.code == 30 && waited.errors.contains("has not joined in time"), "\(waited.all)")
        let late = try await Self.join(lab, waiter.token)
        #expect(late.code == 30 && late.errors.contains("its time is over"), "\(late.all)")
        #expect(Self.isFresh(lab["host-a"]) && Self.isFresh(lab["host-b"]))
    }

    @Test func aStepThatFailsIsUndoneOnBothAndTheTokenStaysGood() async throws {
        let lab = try await FleetLab()
        let (a, b) = (lab["host-a"], lab["host-b"])
        let waiter = try await Self.wait(lab)
        // There is no room for the list.
        _ = try await b.shell("touch /etc/crossdock")
        let failed = try await Self.join(lab, waiter.token)
        #expect(failed.code == 31 && failed.errors.contains("What had been done was undone"), "\(failed.all)")
        try await waiter.process.wait(for: "the other side of it") { waiter.process.output.contains("was undone") }
        _ = try await b.shell("rm /etc/crossdock")
        #expect(Self.isFresh(b) && !a.has("/etc/pki/crossdock") && !a.has(FleetFiles.peers))
        #expect(try await Self.join(lab, waiter.token).code == 0)
        #expect(try await waiter.process.finish().code == 0)
    }

    /// The joining host is killed, or the waiting one, when the other has its certificate and not the list: nothing is left over.
    @Test(arguments: ["host-a", "host-b"])
    func whatIsInterruptedIsUndone(_ killed: String) async throws {
        let lab = try await FleetLab()
        let (a, b) = (lab["host-a"], lab["host-b"])
        let waiter = try await Self.wait(lab)
        try await lab.write(waiter.token + "\n", to: "/root/token", on: "host-b")
        // Taking the list over waits until somebody writes here.
        _ = try await b.shell("mkdir /etc/crossdock && mkfifo /etc/crossdock/fleet.json")
        let joiner = try ChildProcess(
            b.command(["sh", "-c", "exec \(Tool.crossdock) pair --join </root/token"])
        )
        try await joiner.wait(for: "the certificate") { b.has("/etc/pki/crossdock/server-cert.pem") }
        (killed == "host-a" ? waiter.process : joiner).signal(SIGKILL)
        _ = try await (killed == "host-a" ? waiter.process : joiner).finish()
        _ = try await b.shell("timeout 20 sh -c 'echo >/etc/crossdock/fleet.json'; rm -f /etc/crossdock/fleet.json")
        if killed == "host-a" {
            let ended = try await joiner.finish()
            #expect(ended.code == 31 && ended.errors.contains("What had been done was undone"), "\(ended.all)")
            #expect(Self.isFresh(b))
            #expect(try await lab.pair(on: "host-a", ["--list"]).output.contains("interrupted"))
            let next = try await Self.wait(lab)
            let joined = try await Self.join(lab, next.token)
            #expect(joined.code == 0, "\(joined.all)")
            let waited = try await next.process.finish()
            #expect(waited.code == 0 && waited.output.contains("interrupted; it is undone first"), "\(waited.all)")
        } else {
            try await waiter.process.wait(for: "the other side of it") { waiter.process.output.contains("was undone") }
            #expect(!a.has("/etc/pki/crossdock") && !a.has(FleetFiles.peers))
            let joined = try await Self.join(lab, waiter.token)
            #expect(joined.code == 0 && joined.output.contains("interrupted; it is undone first"), "\(joined.all)")
            #expect(try await waiter.process.finish().code == 0)
        }
        for host in [a, b] { #expect(host.text(FleetFiles.peers).contains("CN=host-b"), "\(host.name)") }
    }

    @Test func aMemberRenewsItsOwnCertificateAtTheAuthoritysHost() async throws {
        let lab = try await FleetLab()
        let b = lab["host-b"]
        let waiter = try await Self.wait(lab)
        #expect(try await Self.join(lab, waiter.token).code == 0)
        #expect(try await waiter.process.finish().code == 0)
        try await lab.startAgent("host-a")
        let early = try await lab.pair(on: "host-b", ["--renew", "--batch"])
        #expect(early.code == 0 && early.output.contains("good for"), "\(early.all)")
        try await lab.age("host-b")
        let key = b.text("/etc/pki/crossdock/server-key.pem")
        let renewed = try await lab.pair(on: "host-b", ["--renew", "--batch"])
        #expect(renewed.code == 0 && renewed.output.contains("renewed, for the same names"), "\(renewed.all)")
        #expect(b.text("/etc/pki/crossdock/server-key.pem") != key)
        let checked = try await b.run([Tool.crossdock, "pki", "check", "/etc/pki/crossdock"])
        #expect(checked.code == 0 && !checked.output.contains("expires"), "\(checked.all)")
        #expect(checked.output.contains("host-b") && checked.output.contains(b.address), "\(checked.all)")
        // The authority's host asks nobody.
        try await lab.age("host-a")
        let own = try await lab.pair(on: "host-a", ["--renew", "--batch"])
        #expect(own.code == 0 && own.output.contains("certificate here: CN=host-a"), "\(own.all)")
        let good = try await lab["host-a"].run([Tool.crossdock, "pki", "check", "/etc/pki/crossdock"])
        #expect(good.code == 0 && !good.output.contains("expires"), "\(good.all)")
        // Who is no member any more gets none, and keeps what it has.
        try await lab.age("host-b")
        #expect(try await lab.pair(on: "host-a", ["--undo", "host-b"]).code == 0)
        let last = b.text("/etc/pki/crossdock/server-cert.pem")
        let refused = try await lab.pair(on: "host-b", ["--renew", "--batch"])
        #expect(refused.code == 33 && refused.errors.contains("renews nothing"), "\(refused.all)")
        #expect(b.text("/etc/pki/crossdock/server-cert.pem") == last)
    }
}
