import Emulator
import Glibc
import IO
import Migration
import Source
import TLS
import TestSupport
import Testing
import Web

/// The serial console of a guest that moves from host to host, read where it was first.
@Suite(.serialized, .timeLimit(.minutes(10)))
struct ConsoleRelayEndToEnd {
    /// The hosts a, b and c with a certificate each, and a Linux guest on a whose console is given to the agent.
    private final class Hosts: @unchecked Sendable {
        // Unchecked: each test uses it from one task.
        let lab: Lab
        private var directories: [String: String] = [:]

        init() throws {
            lab = try Lab(emulators: Lab.whole)
            for name in ["a", "b", "c", "d"] {
                directories[name] = try lab.pki.issue("host-\(name)", hosts: ["localhost", "127.0.0.1"])
            }
        }

        func credentials(_ host: String) -> [String] { lab.credentials(directories[host]) }

        func client(_ host: String) throws -> X509Credentials {
            try lab.pki.credentials(.client, directory: directories[host])
        }

        func start(_ host: String, program: String = Lab.crossdock, _ more: [String] = []) async throws {
            try await lab.startDestination(host, program: program, credentials: credentials(host), more: more)
        }

        func startGuest(interval: Int = 10000) async throws {
            let disk = try await lab.makeImage("disk.raw", megabytes: 16, data: 1)
            var command = lab.linuxCommand(disks: [disk], workload: "xd.interval=\(interval)")
            command.removeLast(2)
            command += ["-serial", "unix:\(lab.directory.file("serial.sock")),server=on,wait=off"]
            let started = try await lab.crossdock(
                ["guest", "start", "web1", "--state-dir", lab.state("a"), "--"] + command
            )
            #expect(started.code == 0, "\(started.all)")
            let set = try await lab.crossdock([
                "guest", "set", "web1", "--console", "serial0", "--state-dir", lab.state("a"),
            ])
            #expect(set.code == 0, "\(set.all)")
        }

        func migrate(_ from: String, _ to: String) async throws {
            let result = try await lab.migrate(
                from: from,
                port: lab.controlPort(of: to),
                credentials: credentials(from)
            )
            guard result.code == 0 else { throw TestFailure("\(from) to \(to): \(result.all)") }
        }

        /// A reader at the agent of a host.
        func reader(_ host: String, query: String = "?from=0") async throws -> ConsoleClient {
            let (path, loop) = ("\(lab.state(host))/console.sock", lab.loop)
            return try await loop.run {
                try await ConsoleClient(.unix(path: path), "localhost", nil, query: query, on: loop)
            }
        }

        func run<T: Sendable>(_ body: @escaping @Sendable () async throws -> T) async throws -> T {
            try await lab.loop.run(body)
        }

        func departure(_ host: String) throws -> ConsoleDeparture? {
            try ConsoleDeparture.read("web1", stateDirectory: lab.state(host))
        }

        func grants(_ host: String) -> String {
            let bytes = (try? DurableFile.read("\(lab.state(host))/console-grants.json")) ?? nil
            return String(decoding: bytes ?? [], as: UTF8.self)
        }
    }

    /// Something that has happened or not, seen from any thread.
    private final class Flag: Sendable {
        private let state = Guarded(false)
        var isSet: Bool { state.withLock { $0 } }
        func set() { state.withLock { $0 = true } }
    }

    /// The numbers of whole records, as they came: without what was typed, whose echo is anywhere among them.
    private static func records(_ text: String) -> [Int] {
        text.utf8.filter { !"~@`".utf8.contains($0) }.split(separator: 10).dropLast().compactMap { line in
            let words = line.split(separator: 32)
            guard words.count == 4, words[0].elementsEqual("REC".utf8) else { return nil }
            return Int(String(decoding: words[2], as: UTF8.self))
        }
    }

    private static func isInOrder(_ numbers: [Int]) -> Bool {
        zip(numbers, numbers.dropFirst()).allSatisfy { $1 == $0 + 1 }
    }

    /// Reads until there are more records, and sees that none is missing.
    private static func readOn(_ reader: ConsoleClient, _ what: String) async throws {
        let count = records(reader.text).count
        try await reader.read(what) { records($0.text).count >= count + 40 }
        let numbers = records(reader.text)
        let place = zip(numbers, numbers.dropFirst()).first { $1 != $0 + 1 }
        #expect(place == nil && reader.gaps == 0, "\(what): \(place.map { "\($0)" } ?? "") \(reader.gaps) gaps")
    }

    @Test func aReaderStaysWhereverTheGuestGoes() async throws {
        let hosts = try Hosts()
        do { try await travel(hosts) } catch {
            let words = ["a", "b", "c"].map { "\($0): \(hosts.lab.destinationErrors($0))" }
            throw TestFailure("\(error)\n\(words.joined(separator: "\n"))")
        }
    }

    private func travel(_ hosts: Hosts) async throws {
        for host in ["a", "b", "c"] { try await hosts.start(host) }
        try await hosts.startGuest()
        let reader = try await hosts.reader("a")
        try await hosts.run {
            try await Self.readOn(reader, "records on host a")
            try await reader.wish()
            try await reader.read("the pen") { $0.standing?.writes == true }
        }
        let ring = reader.standing?.ring

        try await hosts.migrate("a", "b")
        try await hosts.run {
            try await reader.read("the new host") { $0.standing?.host == "localhost" && $0.standing?.connected == true }
            try await Self.readOn(reader, "records on host b")
            #expect(reader.notices.contains("The guest has moved to localhost; its console goes on from there"))
            #expect(reader.standing?.writes == true)
            try await reader.type("~")
            try await reader.read("the echo of host b") { $0.text.contains("~") }
        }
        let departure = try #require(try hosts.departure("a"))
        let grant = try #require(departure.grant)
        #expect(departure.identity == "CN=host-b" && !hosts.grants("b").contains(grant.text))
        #expect(hosts.grants("b").contains(grant.digest.hex) && hosts.grants("b").contains("CN=host-a"))

        // Home again: nothing is passed on any more.
        try await hosts.migrate("b", "a")
        try await hosts.run {
            try await reader.read("its home") { $0.standing?.host == nil && $0.standing?.connected == true }
            try await Self.readOn(reader, "records at home")
            let home = "The guest has come to \(HostExamination.ownName); its console goes on from there"
            #expect(reader.notices.contains(home), "\(reader.notices)")
            try await reader.type("@")
            try await reader.read("the echo of host a") { $0.text.contains("@") }
        }
        #expect(try hosts.departure("a") == nil && !hosts.grants("b").contains("CN=host-a"))
        #expect(try hosts.departure("b")?.identity == "CN=host-a")

        // Two hosts on: the one between passes it on with its own grant.
        try await hosts.migrate("a", "b")
        try await hosts.migrate("b", "c")
        try await hosts.run {
            try await Self.readOn(reader, "records on host c")
            try await reader.type("`")
            try await reader.read("the echo of host c") { $0.text.contains("`") }
            #expect(reader.closing.code == nil && reader.standing?.ring == ring && reader.start == 0)
        }
        // Who comes now is led on as well.
        let late = try await hosts.reader("a", query: "?from=\(reader.end)&ring=\(ring ?? "")&view=only")
        try await hosts.run {
            try await Self.readOn(late, "records for a late reader")
            #expect(late.standing?.mayWrite == false)
            late.close()
            reader.close()
        }
    }

    /// What is typed while the guest moves is echoed by it, all of it and in order.
    @Test func noKeyIsLostOnTheWay() async throws {
        let hosts = try Hosts()
        for host in ["a", "b"] { try await hosts.start(host) }
        try await hosts.startGuest(interval: 100000)
        let reader = try await hosts.reader("a")
        try await hosts.run {
            try await reader.read("records") { $0.text.contains("REC") }
            try await reader.wish()
            try await reader.read("the pen") { $0.standing?.writes == true }
        }
        let keys = Array("~@`")
        let loop = hosts.lab.loop
        let isOver = Flag()
        let typing = Task(executorPreference: loop) {
            var count = 0
            while !isOver.isSet {
                try await reader.type(String(keys[count % keys.count]))
                count += 1
                await loop.sleep(for: .milliseconds(10))
            }
            return count
        }
        for (from, to) in [("a", "b"), ("b", "a")] { try await hosts.migrate(from, to) }
        isOver.set()
        let count = try await typing.value
        try await hosts.run {
            let echo = { (reader: ConsoleClient) in reader.text.filter { keys.contains($0) } }
            do { try await reader.read("all echoes") { echo($0).count >= count } } catch {
                Issue.record("\(error): \(echo(reader).count) of \(count) keys")
            }
            let expected = String((0..<count).map { keys[$0 % keys.count] })
            #expect(count > 50 && echo(reader) == expected, "\(count) keys: \(echo(reader))")
            reader.close()
        }
    }

    /// What was opened for a reader who may only look is opened once more for one who writes, on each host on the way.
    @Test func whoComesAfterAReaderWhoLooksMayWrite() async throws {
        let hosts = try Hosts()
        for host in ["a", "b", "c"] { try await hosts.start(host) }
        try await hosts.startGuest(interval: 100000)
        for (from, to) in [("a", "b"), ("b", "c")] { try await hosts.migrate(from, to) }
        let looker = try await hosts.reader("a", query: "?view=only")
        try await hosts.run { try await looker.read("records") { $0.text.contains("REC") } }
        let writer = try await hosts.reader("a", query: "")
        try await hosts.run {
            try await writer.wish()
            try await writer.read("the pen") { $0.standing?.writes == true && $0.standing?.connected == true }
            try await writer.type("~")
            try await writer.read("the echo") { $0.text.contains("~") }
            #expect(!writer.notices.contains { $0.contains("may look here") }, "\(writer.notices)")
            try await looker.read("the echo") { $0.text.contains("~") }
            writer.close()
            looker.close()
        }
    }

    /// Asks the agent of host b, as one host or another.
    private func ask(
        _ hosts: Hosts,
        as host: String,
        _ grant: ConsoleGrant,
        guest: String = "web1",
        identity: String = "CN=host-b",
        kind: ConsoleOpening.Kind = .serial,
        path: [String] = []
    ) async throws -> String {
        let departure = ConsoleDeparture(
            guest: guest,
            host: "localhost",
            port: hosts.lab.controlPort(of: "b"),
            identity: identity,
            grant: grant
        )
        let (credentials, loop) = (try hosts.client(host), hosts.lab.loop)
        return try await loop.run {
            let opening = ConsoleOpening(guest: guest, kind: kind, path: path)
            do {
                let channel = try await RemoteConsole.open(departure, opening, credentials: credentials, on: loop)
                defer { channel.close() }
                // The first frame is a note.
                var parser = ConsoleFrame.Parser()
                while true {
                    let next = try await channel.read(exactly: 1)
                    parser.append(next)
                    if case .note(let bytes)? = try parser.next() {
                        return String(decoding: bytes, as: UTF8.self)
                    }
                }
            } catch let error as MigrationError { return error.message }
        }
    }

    @Test func whoHasNoGrantIsToldNothing() async throws {
        let hosts = try Hosts()
        try await hosts.start("a")
        try await hosts.start("b", ["--allow-console", "CN=host-c view"])
        try await hosts.startGuest(interval: 100000)
        try await hosts.migrate("a", "b")
        let grant = try #require(try hosts.departure("a")?.grant)
        let open = try await ask(hosts, as: "a", grant)
        #expect(open.contains(#""guest":"web1""#) && open.contains(#""may_write":true"#), "\(open)")

        func refusal(_ host: String) -> String {
            "localhost answers: This host opens no such console to 'CN=host-\(host)': it has none, or was given no right for it"
        }
        // A guess, the grant of another identity, of another guest, and guests that are not there: all the same words.
        #expect(try await ask(hosts, as: "a", ConsoleGrant()) == refusal("a"))
        #expect(try await ask(hosts, as: "d", grant) == refusal("d"))
        #expect(try await ask(hosts, as: "a", grant, guest: "web2") == refusal("a"))
        #expect(try await ask(hosts, as: "d", ConsoleGrant(), guest: "web3") == refusal("d"))
        #expect(try await ask(hosts, as: "a", grant, kind: .vnc) == refusal("a"), "it has no display")
        // Who is led to another host than the one that the grant was given to says nothing of it.
        let elsewhere = try await ask(hosts, as: "a", grant, identity: "CN=host-c")
        #expect(elsewhere.contains("only 'CN=host-c' is meant"), "\(elsewhere)")
        // Whom the operator names needs none, and has what he was given.
        let named = try await ask(hosts, as: "c", ConsoleGrant())
        #expect(named.contains(#""guest":"web1""#) && named.contains(#""may_write":false"#), "\(named)")
        #expect(try await ask(hosts, as: "c", ConsoleGrant(), guest: "web2") == refusal("c"))
        // Its operator reads there, and whom nobody has named is told so at once.
        try await hosts.start("c")
        try await hosts.start("d")
        let (name, lab) = ("localhost:\(hosts.lab.controlPort(of: "b"))", hosts.lab)
        func command(_ host: String, _ guest: String = "web1") -> [String] {
            [Lab.crossdock, "console", guest, "--host", name, "--state-dir", lab.state(host)]
        }
        let reading = try ChildProcess(command("c"))
        try await reading.wait(for: "records") { reading.output.contains("REC") }
        let refused = try await Tool.run(command("d"))
        #expect(refused.code == 11 && refused.errors.contains("This host opens no such console"), "\(refused.all)")
        let absent = try await Tool.run(command("c", "web2"))
        #expect(absent.code == 11 && absent.errors.contains("This host opens no such console"), "\(absent.all)")
        let log = hosts.lab.destinationErrors("b")
        #expect(log.contains("'CN=host-a' opens the serial console of guest 'web1'"), "\(log)")
        #expect(log.contains("'CN=host-d' was refused the serial console of guest 'web1'"), "\(log)")
        #expect(!log.contains(grant.text))

        // One that is over opens nothing, also for who has it open.
        let path = "\(hosts.lab.state("b"))/console-grants.json"
        hosts.lab.stopDestination("b")
        let text = String(decoding: try DurableFile.read(path) ?? [], as: UTF8.self)
        let old = text.replacing(/"expires":\d+/, with: #""expires":1000"#)
        #expect(old != text)
        try DurableFile.write(Array(old.utf8), to: path)
        try await hosts.start("b")
        #expect(try await ask(hosts, as: "a", grant) == refusal("a"))
        #expect(try await ask(hosts, as: "c", grant) == refusal("c"))
    }

    /// Who has a right to a console is told why it cannot be had, and at once.
    @Test func whoMayHaveAScreenIsToldThatTheGuestDoesNotRun() async throws {
        let hosts = try Hosts()
        let lab = hosts.lab
        try await hosts.start("b", ["--allow-console", "CN=host-c"])
        try await lab.startIdleGuest(
            "web2",
            on: "b",
            disks: [],
            more: ["-vga", "std", "-vnc", "unix:\(lab.directory.file("vnc.sock"))"]
        )
        let stopped = try await lab.crossdock(["guest", "stop", "web2", "--force", "--state-dir", lab.state("b")])
        #expect(stopped.code == 0, "\(stopped.all)")
        let absence = try await ask(hosts, as: "c", ConsoleGrant(), guest: "web2", kind: .vnc)
        #expect(
            absence.hasSuffix("The vnc console of guest 'web2' cannot be had now: the guest does not run"),
            "\(absence)"
        )
        let refused = try await ask(hosts, as: "d", ConsoleGrant(), guest: "web2", kind: .vnc)
        #expect(refused.contains("This host opens no such console to 'CN=host-d'"), "\(refused)")
        // Who reads by a host's name is told at once why nothing comes, and not when a minute is over.
        try await hosts.start("c")
        lab.stopDestination("b")
        let waiting = try ChildProcess([
            Lab.crossdock, "console", "web1", "--host", "localhost:1", "--state-dir", lab.state("c"),
        ])
        try await waiting.wait(seconds: 20, for: "why it waits") { waiting.errors.contains("trying again") }
        waiting.signal(SIGTERM)
        _ = try await waiting.finish()
    }

    /// Who listens and says nothing holds nobody up for ever.
    @Test func aHostThatNeverAnswersIsLeft() async throws {
        let hosts = try Hosts()
        let (loop, credentials) = (hosts.lab.loop, try hosts.client("a"))
        try await loop.run {
            let silent = try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
            defer { silent.close() }
            let departure = ConsoleDeparture(
                guest: "web1",
                host: "localhost",
                port: silent.address.port ?? 0,
                identity: "CN=host-b",
                grant: ConsoleGrant()
            )
            do {
                let opening = ConsoleOpening(guest: "web1", kind: .serial)
                _ = try await RemoteConsole.open(departure, opening, credentials: credentials, on: loop)
                Issue.record("a console was opened where there is none")
            } catch let error as MigrationError { #expect(error.code == .unreachable, "\(error)") }
        }
    }
}
