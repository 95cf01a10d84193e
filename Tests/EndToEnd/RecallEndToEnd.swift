import Emulator
import Glibc
import IO
import Migration
import Source
import TLS
import TestSupport
import Testing

/// Guests that go home when their home asks for them, and what an operator has said about a guest that goes with it.
@Suite(.serialized, .timeLimit(.minutes(10)))
struct RecallEndToEnd {
    /// The hosts a, b and c with a certificate each.
    private struct Hosts {
        let lab: Lab
        let directories: [String: String]

        init() throws {
            let lab = try Lab()
            self.lab = lab
            var directories: [String: String] = [:]
            for name in ["a", "b", "c"] {
                directories[name] = try lab.pki.issue("host-\(name)", hosts: ["localhost", "127.0.0.1"])
            }
            self.directories = directories
        }

        func credentials(_ host: String) -> [String] { lab.credentials(directories[host]) }

        func start(_ host: String, _ more: [String] = []) async throws {
            try await lab.startDestination(host, credentials: credentials(host), more: more)
        }

        func migrate(_ guest: String = "web1", from: String, to: String) async throws -> ToolResult {
            try await lab.migrate(
                guest,
                from: from,
                port: lab.controlPort(of: to),
                credentials: credentials(from)
            )
        }

        /// Who asks, as one host, another one.
        func target(_ host: String, as asker: String) throws -> TargetHost {
            TargetHost(
                host: "localhost",
                port: lab.controlPort(of: host),
                evacuation: "1-r",
                credentials: try lab.pki.credentials(.client, directory: directories[asker]),
                on: lab.loop
            )
        }

        func recall(_ guests: [String]?, to host: String, isQuestion: Bool = false) -> HostMessage.Recall {
            .init(guests: guests, address: "localhost:\(lab.controlPort(of: host))", isQuestion: isQuestion)
        }

        func runs(_ guest: String, on host: String) -> Bool {
            guard let record = (try? lab.guests(host).load(guest)) ?? nil else { return false }
            return record.released == nil && record.process?.isRunning == true
                && ((try? MigrationStore(stateDirectory: lab.state(host)).startBar(of: guest)) ?? nil) == nil
        }

        func startGuest(_ name: String = "web1", on host: String = "a") async throws {
            let disk = try await lab.makeImage("\(name).raw", megabytes: 16, data: 2)
            try await lab.startIdleGuest(name, on: host, disks: [disk])
        }
    }

    @Test func aGuestComesHomeWhenItsHomeAsksAndThePolicyListsIt() async throws {
        let hosts = try Hosts()
        try await hosts.startGuest()
        try await hosts.startGuest("web2")
        try await hosts.start("a", ["--allow-recall", "CN=host-b"])
        try await hosts.start("b", ["--allow-recall", "CN=host-a"])
        for guest in ["web1", "web2"] {
            let away = try await hosts.migrate(guest, from: "a", to: "b")
            #expect(away.code == 0, "\(away.all)")
        }
        let origin = try #require(try hosts.lab.guests("b").load("web1")?.origin)
        #expect(origin == .init(identity: "CN=host-a", address: "127.0.0.1"))
        let target = try hosts.target("b", as: "a")
        let question = try await target.recall(hosts.recall(nil, to: "a", isQuestion: true))
        #expect(question == [.init(guest: "web1"), .init(guest: "web2")])
        #expect(hosts.runs("web1", on: "b"))
        // Somebody else has one of them in hand.
        var lock = try MigrationStore(stateDirectory: hosts.lab.state("b")).lock(guest: "web2")
        let busy = try await target.recall(hosts.recall(["web2"], to: "a"))
        #expect(busy?.first?.isLater == true && busy?.first?.reason?.contains("is being migrated") == true)
        #expect(lock != nil)
        lock = nil
        let answers = try await #require(try target.recall(hosts.recall(["web1", "web9"], to: "a")))
        #expect(answers.first?.migration != nil && answers.first?.reason == nil, "\(answers)")
        #expect(answers.last?.reason?.contains("No guest 'web9' that is here came from 'CN=host-a'") == true)
        try await eventually(seconds: 60, "the guest is home") { hosts.runs("web1", on: "a") }
        // At home it has no other home.
        #expect(try hosts.lab.guests("a").load("web1")?.origin == nil)
        try await eventually("it has gone") { !hosts.runs("web1", on: "b") }
        let again = try await target.recall(hosts.recall(["web1"], to: "a"))
        #expect(again?.first?.migration == nil && again?.first?.reason != nil, "\(again ?? [])")
        #expect(hosts.runs("web2", on: "b"))
        // It came home from there, and is nobody else's all the same.
        let home = try hosts.target("a", as: "b")
        let wanted = try await home.recall(hosts.recall(["web1"], to: "b", isQuestion: true))
        #expect(wanted?.first?.reason == "No guest 'web1' that is here came from 'CN=host-b'", "\(wanted ?? [])")
    }

    @Test func nobodyElseRecallsAGuestAndItGoesToNobodyElse() async throws {
        let hosts = try Hosts()
        try await hosts.startGuest()
        try await hosts.start("b")
        try await hosts.start("c")
        #expect(try await hosts.migrate(from: "a", to: "b").code == 0)
        // The policy lists nobody.
        let unlisted = await #expect(throws: MigrationError.self) {
            try await hosts.target("b", as: "a").recall(hosts.recall(nil, to: "c"))
        }
        #expect(unlisted?.code == .refused && unlisted?.message.contains("allow-recall = CN=host-a") == true)
        hosts.lab.stopDestination("b")
        try await hosts.start("b", ["--allow-recall", "CN=host-a", "--allow-recall", "CN=host-c"])
        // Another host that is listed has no guest here, and learns of none.
        let other = try hosts.target("b", as: "c")
        #expect(try await other.recall(hosts.recall(nil, to: "c")) == [])
        let named = try await other.recall(hosts.recall(["web1"], to: "c"))
        #expect(named?.first?.reason == "No guest 'web1' that is here came from 'CN=host-c'")
        // The home names another host: its agent has a good certificate for that address, and is not the one that asks.
        let target = try hosts.target("b", as: "a")
        let begun = try await target.recall(hosts.recall(["web1"], to: "c"))
        #expect(begun?.first?.migration != nil, "\(begun ?? [])")
        try await eventually("the migration has ended") {
            hosts.lab.destinationErrors("b").contains("proved to be 'CN=host-c', and only 'CN=host-a' is meant")
        }
        #expect(hosts.runs("web1", on: "b") && !hosts.runs("web1", on: "c"))
        // Who asks need not look into the logs of the other host.
        try await eventually("it is told why") {
            let answer = try await target.recall(hosts.recall(["web1"], to: "c", isQuestion: true))?.first
            return answer?.reason == nil && answer?.lastFailure?.contains("only 'CN=host-a' is meant") == true
        }
        for address in ["", ":", "nowhere\n:1", String(repeating: "a", count: 300)] {
            let wrong = await #expect(throws: MigrationError.self) {
                try await target.recall(.init(guests: nil, address: address))
            }
            #expect(wrong?.message.contains("is no host to send guests to") == true, "\(wrong?.message ?? "")")
        }
    }

    @Test func aSecondHopKeepsTheHomeAndItsWordAloneMovesNothing() async throws {
        let hosts = try Hosts()
        try await hosts.startGuest()
        for host in ["b", "c"] { try await hosts.start(host, ["--allow-recall", "CN=host-a"]) }
        let set = try await hosts.lab.crossdock([
            "guest", "set", "web1", "--state-dir", hosts.lab.state("a"), "--label", "env=prod", "--label", "tier=web",
            "--evacuate", "stop", "--anti-affinity", "db", "--priority=-7",
        ])
        #expect(set.code == 0, "\(set.all)")
        #expect(try await hosts.migrate(from: "a", to: "b").code == 0)
        let hop = try await hosts.migrate(from: "b", to: "c")
        #expect(hop.code == 0, "\(hop.all)")
        let record = try #require(try hosts.lab.guests("c").load("web1"))
        #expect(record.origin == .init(identity: "CN=host-a", address: "127.0.0.1", toldBy: "CN=host-b"))
        #expect(record.placement?.labels == ["env": "prod", "tier": "web"])
        #expect(record.placement?.evacuation == .stop && record.placement?.antiAffinity == "db")
        #expect(record.placement?.priority == -7)
        let answers = try await hosts.target("c", as: "a").recall(hosts.recall(nil, to: "b"))
        #expect(answers?.first?.reason?.contains("that host's word only") == true, "\(answers ?? [])")
        #expect(hosts.runs("web1", on: "c"))
        // The host that had it last may have it back, by its name: what is at home there is another question.
        let last = try hosts.target("c", as: "b")
        let unlisted = await #expect(throws: MigrationError.self) { try await last.recall(hosts.recall(nil, to: "b")) }
        #expect(unlisted?.message.contains("allow-recall = CN=host-b") == true)
        hosts.lab.stopDestination("c")
        try await hosts.start("c", ["--allow-recall", "CN=host-a", "--allow-recall", "CN=host-b"])
        let asked = try hosts.target("c", as: "b")
        #expect(try await asked.recall(hosts.recall(nil, to: "b", isQuestion: true)) == [])
        #expect(try await asked.recall(hosts.recall(["web1"], to: "b", isQuestion: true)) == [.init(guest: "web1")])
        // Back where it was, what that host saw itself is what counts.
        let back = try await hosts.migrate(from: "c", to: "b")
        #expect(back.code == 0, "\(back.all)")
        #expect(try hosts.lab.guests("b").load("web1")?.origin?.isProven(for: "CN=host-a") == true)
        let question = try await hosts.target("b", as: "a").recall(hosts.recall(nil, to: "b", isQuestion: true))
        #expect(question == [.init(guest: "web1")])
    }

    @Test func whatIsSaidAboutAGuestIsShownChangedAndChecked() async throws {
        let lab = try Lab()
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 16, data: 1)])
        let state = ["--state-dir", lab.state("a")]
        func set(_ words: [String]) async throws -> ToolResult {
            try await lab.crossdock(["guest", "set", "web1"] + state + words)
        }
        let first = try await set([
            "--label", "env=prod", "--label", "tier=web", "--evacuate", "leave", "--priority", "5",
        ])
        #expect(first.code == 0, "\(first.all)")
        // What is not named stays.
        #expect(try await set(["--label", "tier=", "--anti-affinity", "db"]).code == 0)
        let shown = try await lab.crossdock(["guest", "show", "web1"] + state)
        let words = "env=prod, evacuate leave, apart from others of 'db', priority 5"
        #expect(shown.output.contains(words), "\(shown.all)")
        let listed = try await lab.crossdock(["guest", "list", "--json"] + state)
        #expect(listed.output.contains("\"env\" : \"prod\"") && !listed.output.contains("tier"), "\(listed.all)")
        #expect(try await set(["--anti-affinity", ""]).code == 0)
        #expect(try lab.guests("a").load("web1")?.placement?.antiAffinity == nil)
        let long = "a=" + String(repeating: "x", count: 256)
        for words in [
            ["--label", "env"], ["--label", "=x"], ["--label", "a b=x"], ["--label", "a=x\ny"], ["--priority", "1001"],
            ["--evacuate", "maybe"], ["--anti-affinity", "a b"], [], ["--label", long],
        ] {
            let wrong = try await set(words)
            #expect(wrong.code == 64, "\(words): \(wrong.all)")
        }
        #expect(try await lab.crossdock(["guest", "set", "web9", "--priority", "1"] + state).code == 10)
        // It survives a new start of the guest.
        #expect(try await lab.crossdock(["guest", "stop", "web1", "--force"] + state).code == 0)
        #expect(try await lab.crossdock(["guest", "start", "web1"] + state).code == 0)
        #expect(try lab.guests("a").load("web1")?.placement?.evacuation == .leave)
    }
}
