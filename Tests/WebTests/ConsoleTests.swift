import Emulator
import Glibc
import IO
import Migration
import TLS
import TestSupport
import Testing

@testable import Web

/// Consoles of real guests, over the server's real sockets.
@Suite(.serialized, .timeLimit(.minutes(10)))
struct ConsoleTests {
    /// A guest whose console the server holds.
    final class World: @unchecked Sendable {
        // Unchecked: each test uses its world from one task.
        let lab: WebLab
        let store: GuestStore
        let loop = EventLoop(name: "readers")
        let socket: String
        var record: GuestRecord
        var browser: X509Credentials

        /// - Parameter isLinux: whether it is a Linux that writes records; one that is not stays in its firmware.
        init(isLinux: Bool = true) async throws {
            let commands = Guarded("")
            lab = try await WebLab { configuration in
                let path = "\(configuration.host.stateDirectory)/console.sock"
                commands.withLock { $0 = path }
                configuration.commands = .unix(path: path)
            }
            store = GuestStore(stateDirectory: lab.state)
            browser = try lab.browserCredentials()
            socket = lab.directory.file("serial.sock")
            var command = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-cpu", "max", "-m", "256", "-nodefaults"]
            command += ["-display", "none", "-serial", "unix:\(socket),server=on,wait=off"]
            if isLinux {
                let parts = #filePath.split(separator: "/").dropLast(3)
                let files = "/" + parts.joined(separator: "/") + "/.cache/guest"
                let disk = lab.directory.file("disk.raw")
                _ = try await Tool.run(["truncate", "-s", "16M", disk])
                command += ["-kernel", "\(files)/vmlinuz", "-initrd", "\(files)/initrd", "-append"]
                command += ["console=ttyS0 quiet no_timer_check cryptomgr.notests xd.interval=20000"]
                command += ["-drive", "file=\(disk),format=raw,if=virtio"]
            }
            record = GuestRecord(name: "web1", commandLine: GuestCommandLine(arguments: command, directory: "/"))
            record.placement = GuestPlacement()
            record.placement?.console = "serial0"
            try await start()
        }

        deinit {
            record.process?.signal(SIGKILL)
            loop.stop()
        }

        func start() async throws {
            let (store, loop, before) = (store, loop, record)
            record = try await loop.run {
                var record = before
                try await store.start(&record, on: loop).close()
                return record
            }
        }

        var local: SocketAddress { .unix(path: "\(lab.state)/console.sock") }

        /// A reader with a cookie, or by the socket of the commands.
        func reader(_ cookie: String?, query: String = "?from=0") async throws -> ConsoleClient {
            if let cookie {
                return try await ConsoleClient(lab.address, lab.host, browser, cookie: cookie, query: query, on: loop)
            }
            return try await ConsoleClient(local, "localhost", nil, query: query, on: loop)
        }

        /// Runs `body` on the readers' loop.
        func run<T: Sendable>(_ body: @escaping @Sendable () async throws -> T) async throws -> T {
            try await loop.run(body)
        }
    }

    /// The numbers of whole records, as they came.
    private static func records(_ text: String) -> [Int] {
        text.utf8.split(separator: 10).dropLast().compactMap { line in
            let words = line.split(separator: 32)
            guard words.count == 4, words[0].elementsEqual("REC".utf8) else { return nil }
            return Int(String(decoding: words[2], as: UTF8.self))
        }
    }

    private static func isInOrder(_ numbers: [Int]) -> Bool {
        zip(numbers, numbers.dropFirst()).allSatisfy { $1 == $0 + 1 }
    }

    @Test func allReadTheSameBytesAndTheLastToAskWrites() async throws {
        let world = try await World()
        let (act, look) = (try await world.lab.cookie(guest: "web1"), try await world.lab.cookie(.view, guest: "web1"))
        try await world.run {
            let (slow, first, second) = (
                try await world.reader(look), try await world.reader(act), try await world.reader(nil)
            )
            // The slow one takes nothing until the others have all this.
            try await first.read("records") { Self.records($0.text).count >= 200 }
            let until = first.end
            try await second.read("the same") { $0.end >= until }
            try await slow.read("the same") { $0.end >= until }
            for reader in [first, second, slow] {
                #expect(reader.gaps == 0 && reader.start == 0)
                #expect(Array(reader.bytes.prefix(Int(until))) == Array(first.bytes.prefix(Int(until))))
            }
            #expect(first.text.contains("READY") && Self.isInOrder(Self.records(first.text)))
            // Who comes later begins where it wants to.
            let late = try await world.reader(look, query: "?from=\(until - 1000)&ring=\(first.standing?.ring ?? "")")
            try await late.read("its bytes") { $0.bytes.count >= 1000 }
            #expect(late.start == until - 1000 && late.gaps == 0)
            #expect(Array(late.bytes.prefix(1000)) == Array(first.bytes[Int(until - 1000)..<Int(until)]))
            // Offsets of another ring mean nothing.
            let stranger = try await world.reader(look, query: "?from=7&ring=abc")
            try await stranger.read("something") { !$0.bytes.isEmpty }
            #expect(stranger.start != 7)
            stranger.close()

            try await first.wish()
            try await first.read("the right to write") { $0.standing?.writes == true }
            try await first.type("~")
            try await first.read("its echo") { $0.text.contains("~") }
            try await second.wish()
            try await second.read("the right to write") { $0.standing?.writes == true }
            try await first.read("that it lost it") { $0.standing?.writes == false }
            #expect(first.notices.last?.hasSuffix("has taken over the writing") == true)
            try await first.type("`")
            try await first.read("a refusal") {
                $0.notices.last?.contains("writes; who opens the console anew does") == true
            }
            #expect(late.standing?.mayWrite == false)
            try await late.wish()
            try await late.type("`")
            try await late.read("a refusal") { $0.notices.last == "'operator' may look here, and not write" }
            try await second.type("@")
            try await second.read("its echo") { $0.text.contains("@") }
            let end = second.end
            for reader in [first, late, slow] {
                try await reader.read("the echo") { $0.end >= end }
                #expect(!reader.text.contains("`") && reader.gaps == 0)
            }
            #expect(late.standing?.writer == second.standing?.writer && second.standing?.readers == 4)
            second.close()
            try await late.read("that nobody writes") { $0.standing?.writer == nil && $0.standing?.readers == 3 }
        }
        await world.lab.server.stop()
    }

    @Test func whoMayNotHasNoConsole() async throws {
        let world = try await World(isLinux: false)
        let (lab, host) = (world.lab, world.lab.host)
        let (own, other, all) = (
            try await lab.cookie(.view, guest: "web1"), try await lab.cookie(guest: "web2"), try await lab.cookie()
        )
        func statuses(_ credentials: (any TLSCredentials)?, _ cookie: String?) async throws -> [Int] {
            var found: [Int] = []
            for guest in ["web1", "web3"] {
                for path in ["/consoles/\(guest)", "/consoles/\(guest)/serial"] {
                    found.append(
                        try await lab.client(credentials) { client in
                            try await client.ask(
                                "GET",
                                path,
                                [
                                    "Host": host, "Origin": "https://\(host)", "Cookie": cookie ?? "x=y",
                                    "Upgrade": "websocket",
                                    "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
                                    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
                                ]
                            ).status
                        }
                    )
                }
            }
            return found
        }
        #expect(try await statuses(nil, nil) == [401, 401, 401, 401])
        // A certificate is told no guest's name: there is no difference between those that are there and others.
        #expect(try await statuses(try lab.pki.credentials(.client), nil) == [403, 403, 403, 403])
        #expect(try await statuses(nil, other) == [403, 403, 403, 403])
        #expect(try await statuses(nil, own) == [200, 101, 403, 403])
        #expect(try await statuses(nil, all) == [200, 101, 404, 404])
        try await lab.client { client in
            let absent = try await client.ask("GET", "/consoles/web3", ["Host": host, "Cookie": all])
            #expect(absent.text.contains("This host has no guest 'web3'"), "\(absent.text)")
            let stolen = try await client.ask("GET", "/consoles/web1/serial", ["Host": host, "Cookie": all])
            #expect(stolen.status == 403, "without an origin")
            let bad = try await client.ask(
                "GET",
                "/consoles/web1/serial?from=-1",
                ["Host": host, "Cookie": all, "Origin": "https://\(host)"]
            )
            #expect(bad.status == 400)
            let page = try await client.ask("GET", "/console/web1", ["Host": host])
            #expect(page.status == 200 && page.text.contains("console.js"))
        }
        // The socket of the commands has consoles and nothing else.
        let local = world.local
        let loop = world.loop
        let answers = try await world.run {
            let client = try await HTTPClient.connect(to: local, nil, on: loop)
            defer { client.close() }
            var answers: [Int] = []
            for path in ["/consoles/web1", "/", "/session", "/metrics", "/events"] {
                answers.append(try await client.ask("GET", path, ["Host": "localhost"]).status)
            }
            return answers
        }
        #expect(answers == [200, 404, 404, 404, 404])
        await lab.server.stop()
    }

    @Test func aGuestIsStartedAgainAndLeaves() async throws {
        let world = try await World()
        try await world.run {
            let reader = try await world.reader(nil)
            try await reader.read("READY") { $0.text.contains("READY") }
            world.record.process?.signal(SIGKILL)
            try await reader.read("that it is gone") { $0.standing?.connected == false }
            let (ring, before) = (reader.standing?.ring, reader.end)
            try await world.start()
            try await reader.read("that it is back") { $0.standing?.connected == true }
            try await reader.read("READY again") { $0.text.ranges(of: "READY").count == 2 }
            #expect(reader.gaps == 0 && reader.standing?.ring == ring && reader.end > before)
            // It goes to another host.
            world.record.released = .init(migration: "x", destination: "host-b:1")
            try world.store.save(world.record)
            try await reader.readToTheEnd()
            #expect(reader.closing == (4001, "host-b:1"))
            // It is back, and the operator takes the console.
            world.record.released = nil
            try world.store.save(world.record)
            let next = try await world.reader(nil)
            try await next.read("a connection") { $0.standing?.connected == true }
            #expect(next.standing?.ring != ring)
            world.record.placement = nil
            try world.store.save(world.record)
            try await next.readToTheEnd()
            #expect(next.closing == (4000, "the agent holds this console no more"))
        }
        await world.lab.server.stop()
    }

    @Test func readersAreToldWhileTheGuestIsUndecidedAndWhenItIsNotAnyMore() async throws {
        let world = try await World(isLinux: false)
        let store = MigrationStore(stateDirectory: world.lab.state)
        let id = "1700000000-0001"
        try DurableFile.makeDirectory(store.directory(of: id))
        let journal = try Journal(creating: store.journal(of: id))
        try journal.append(.offered(guest: "web1", destination: "host-b", order: 1))
        try await world.run {
            let reader = try await world.reader(nil)
            // Nobody works on the migration, and the guest runs: there is nothing to tell.
            try await reader.read("a connection") { $0.standing?.connected == true }
            let monitor = try await world.store.connect(to: world.record, on: world.loop)
            _ = try await monitor.execute("stop")
            try await reader.read("that it stands still") { $0.standing?.trouble != nil }
            let still = try #require(reader.standing?.trouble)
            #expect(still.command == "crossdock recover \(id)" && still.host == "host-a", "\(still)")
            #expect(still.sentence.contains("stands still ('paused')"), "\(still)")
            try journal.append(.released)
            try await reader.read("that it is undecided") {
                $0.standing?.trouble?.sentence.contains("paused and undecided") == true
            }
            let client = try await HTTPClient.connect(to: world.local, nil, on: world.loop)
            defer { client.close() }
            for path in ["/consoles/web1", "/consoles/web1/vnc"] {
                let answer = try await client.ask("GET", path, ["Host": "localhost"])
                #expect(answer.text.contains("crossdock recover \(id)"), "\(answer.text)")
            }
            try journal.append(.rolledBack(reason: "it was taken back"))
            try await reader.read("that it is decided") { $0.standing?.trouble == nil }
            #expect(reader.standing?.connected == true)
            monitor.close()
            reader.close()
        }
        await world.lab.server.stop()
    }

    @Test func whoOpensAConsoleAgainAndAgainDoesNotFillTheLog() async throws {
        let world = try await World(isLinux: false)
        try await world.run {
            for _ in 0..<(2 * LogLimit.lines) {
                let reader = try await world.reader(nil)
                try await reader.wish()
                try await reader.read("the pen") { $0.standing?.writes == true }
                reader.close()
            }
        }
        let lines = world.lab.log.all.filter {
            $0.contains("opens the console") || $0.contains("writes to the console")
        }
        #expect((2...(2 * LogLimit.lines)).contains(lines.count), "\(lines.count) lines")
        await world.lab.server.stop()
    }

    @Test func nothingIsTypedToWhoIsNotTheGuest() async throws {
        let world = try await World(isLinux: false)
        try await world.run {
            let first = try await world.reader(nil)
            try await first.read("a connection") { $0.standing?.connected == true }
            first.close()
            // As a guest's QEMU that was taken over could do: something else is where its socket was.
            world.record.placement = nil
            try world.store.save(world.record)
            unlink(world.socket)
            let trap = try await Listener.listen(on: .unix(path: world.socket), loop: world.loop)
            defer { trap.close() }
            let absent = try await HTTPClient.connect(to: world.local, nil, on: world.loop)
            #expect(try await absent.ask("GET", "/consoles/web1", ["Host": "localhost"]).status == 404)
            absent.close()
            world.record.placement = GuestPlacement()
            world.record.placement?.console = "0"
            try world.store.save(world.record)
            let second = try await world.reader(nil)
            try await second.read("why not") { $0.standing?.reason?.contains("is not the guest's QEMU") == true }
            #expect(second.standing?.connected == false)
            try await second.wish()
            try await second.type("secret\r")
            try await second.read("the pen") { $0.standing?.writes == true }
        }
        await world.lab.server.stop()
    }
}
