import Emulator
import IO
import Migration
import TLS
import TestSupport
import Testing

@testable import Web

/// A console that another host's agent passes on, by agents that do not keep to anything.
@Suite(.serialized, .timeLimit(.minutes(5)))
struct ConsoleRelayTests {
    /// What the other agent does with a connection.
    private typealias Script = @Sendable (_ channel: any Channel, _ opening: ConsoleOpening) async throws -> Void

    /// A server whose guest has gone to a host `b`, where each connection is served by the next script; the last one serves all others, too.
    private final class World: Sendable {
        let lab: WebLab
        let loop = EventLoop(name: "readers")
        private let asked = Openings()
        /// What was asked for.
        var openings: [ConsoleOpening] { asked.all }

        /// A list that several threads add to.
        private final class Openings: Sendable {
            private let list = Guarded<[ConsoleOpening]>([])
            func add(_ opening: ConsoleOpening) -> Int {
                list.withLock {
                    $0.append(opening)
                    return $0.count
                }
            }
            var all: [ConsoleOpening] { list.withLock { $0 } }
        }

        init(patience: Duration = .seconds(60), _ scripts: [Script], isGranted: Bool = true) async throws {
            let asked = asked
            lab = try await WebLab { configuration in
                configuration.commands = .unix(path: "\(configuration.host.stateDirectory)/console.sock")
                configuration.host.consolePatience = patience
                configuration.host.openConsole = { departure, opening, loop in
                    let count = asked.add(opening)
                    guard departure.host == "b", !scripts.isEmpty else {
                        throw MigrationError(.refused, "b answers: no")
                    }
                    let (near, far) = MemoryChannel.pair(on: loop, capacity: 256 << 10)
                    let script = scripts[min(count, scripts.count) - 1]
                    Task(executorPreference: loop) {
                        try? await script(far, opening)
                        far.close()
                    }
                    return near
                }
            }
            var record = GuestRecord(
                name: "web1",
                commandLine: GuestCommandLine(arguments: ["qemu-system-x86_64"], directory: "/")
            )
            record.placement = GuestPlacement()
            record.placement?.console = "serial0"
            record.released = .init(migration: "x", destination: "b")
            try GuestStore(stateDirectory: lab.state).save(record)
            try ConsoleDeparture(
                guest: "web1",
                host: "b",
                port: 1,
                identity: "CN=b",
                grant: isGranted ? ConsoleGrant() : nil
            )
            .write(stateDirectory: lab.state)
        }

        deinit { loop.stop() }

        func reader(query: String = "") async throws -> ConsoleClient {
            let (path, loop) = ("\(lab.state)/console.sock", loop)
            return try await loop.run {
                try await ConsoleClient(.unix(path: path), "localhost", nil, query: query, on: loop)
            }
        }
    }

    private static func note(_ ring: String = "ab", next: UInt64 = 0, writes: Bool? = nil, notice: String? = nil)
        throws -> [UInt8]
    {
        var standing = ConsoleStanding(
            guest: "web1",
            ring: ring,
            oldest: 0,
            next: next,
            connected: true,
            reason: nil,
            readers: 1,
            writer: nil
        )
        (standing.mayWrite, standing.writes, standing.notice) = (true, writes, notice)
        return ConsoleFrame.note(try JSONText.encode(standing)).encoded
    }

    private static func output(_ text: String, at offset: UInt64) -> [UInt8] {
        ConsoleFrame.output(offset: offset, Array(text.utf8)).encoded
    }

    /// Reads until the other end goes.
    private static func stay(_ channel: any Channel) async throws {
        let buffer = IOBuffer(capacity: 4096)
        while try await channel.readSome(into: buffer.mutable(0..<buffer.capacity)) > 0 {}
    }

    @Test func itGoesOnWhereTheConnectionWasLost() async throws {
        let world = try await World([
            { channel, _ in
                try await channel.write(Self.note() + Self.output("one ", at: 0) + Self.output("two ", at: 4))
                try await channel.finishWriting()
            },
            { channel, opening in
                try await channel.write(
                    Self.note(next: 100, notice: "red \u{1b}[31m") + Self.output("three ", at: opening.from ?? 0)
                        + Self.output("late", at: 50)
                )
                try await Self.stay(channel)
            },
        ])
        let reader = try await world.reader()
        try await world.loop.run {
            try await reader.read("all of it") { $0.text.hasSuffix("late") }
            #expect(reader.text == "one two three late" && reader.gaps == 1, "what is missing is not hidden")
            #expect(reader.standing?.ring == "ab" && reader.standing?.host == "b")
            #expect(reader.notices.contains { $0.hasPrefix("red ") && !$0.contains("\u{1b}") }, "\(reader.notices)")
            reader.close()
        }
        let openings = world.openings
        #expect(openings.map(\.from) == [nil, 8] && openings.map(\.ring) == [nil, "ab"])
        #expect(openings.allSatisfy { $0.grant == nil && $0.hops == 1 && $0.path.count == 1 && !$0.view })
        await world.lab.server.stop()
    }

    @Test(arguments: [
        ConsoleFrame.output(offset: 0, Array("again".utf8)).encoded, ConsoleFrame.output(offset: .max, [1]).encoded,
        ConsoleFrame.output(offset: 1 << 53 + 1, [1]).encoded, ConsoleFrame.input([1]).encoded, [9, 0, 0, 0],
        [0, 255, 255, 255], [1, 0, 0, 1, 0], [3, 0, 0, 6, 15, 160, 27, 91, 50, 74],
        ConsoleFrame.note(
            Array(#"{"guest":"web1","ring":"../x","oldest":0,"next":0,"connected":true,"readers":0}"#.utf8)
        ).encoded,
    ])
    func whoSpeaksNoConsoleIsLeft(_ bytes: [UInt8]) async throws {
        let world = try await World(
            patience: .milliseconds(500),
            [
                { channel, _ in
                    try await channel.write(Self.note() + Self.output("whole", at: 7) + bytes)
                    try await Self.stay(channel)
                },
                { channel, _ in
                    try await channel.write(bytes)
                    try await Self.stay(channel)
                },
            ]
        )
        let reader = try await world.reader()
        try await world.loop.run {
            try await reader.readToTheEnd()
            #expect(reader.text == "whole" && reader.start == 7 && reader.gaps == 0)
            #expect(reader.closing == (4001, "b"))
        }
        #expect(world.openings.count > 1, "it was asked again")
        await world.lab.server.stop()
    }

    @Test func aFloodFillsNoMoreThanTheRing() async throws {
        let world = try await World([
            { channel, _ in
                try await channel.write(Self.note())
                let piece = [UInt8](repeating: 65, count: ConsoleFrame.mostBytes)
                for index in 0..<UInt64(512) {
                    let frame = ConsoleFrame.output(offset: index * UInt64(piece.count), piece)
                    try await channel.write(frame.encoded)
                }
                try await channel.write(Self.note(notice: "all was said"))
                try await Self.stay(channel)
            }
        ])
        let (reader, late) = (try await world.reader(), try await world.reader())
        try await world.loop.run {
            try await reader.read("the end") { $0.notices.contains("all was said") }
            // Who has taken nothing meanwhile gets what is kept, and is told what it missed.
            try await late.read("the end") { $0.notices.contains("all was said") && $0.bytes.count >= 1 << 20 }
            #expect(late.bytes.allSatisfy { $0 == 65 })
            let standing = try #require(late.standing)
            #expect(standing.next - standing.oldest <= 1 << 20)
            reader.close()
            late.close()
        }
        await world.lab.server.stop()
    }

    @Test func whoWritesHereWritesThere() async throws {
        let seen = Typed()
        let world = try await World([
            { channel, _ in
                try await channel.write(Self.note(writes: false))
                var parser = ConsoleFrame.Parser()
                let buffer = IOBuffer(capacity: 4096)
                while true {
                    let count = try await channel.readSome(into: buffer.mutable(0..<buffer.capacity))
                    if count == 0 { return }
                    parser.append(buffer.bytes(0..<count))
                    while let frame = try parser.next() {
                        seen.add(frame)
                        if case .note(let bytes) = frame, let wish = JSONText.decode(ConsoleWish.self, from: bytes) {
                            try await channel.write(Self.note(writes: wish.write))
                        }
                        if case .input(let bytes) = frame, bytes == [33] {
                            // Somebody there takes it.
                            try await channel.write(
                                Self.note(writes: false, notice: "carol has taken over the writing")
                            )
                        }
                    }
                }
            }
        ])
        let (first, second) = (try await world.reader(), try await world.reader())
        try await world.loop.run {
            try await first.wish()
            try await first.type("typed early ")
            try await first.read("the pen") { $0.standing?.writes == true }
            try await eventually("it comes there") { seen.text == "typed early " }
            try await second.wish()
            try await second.read("the pen") { $0.standing?.writes == true }
            try await first.type("lost")
            try await second.type("kept!")
            try await eventually("it comes there") { seen.text == "typed early kept!" }
            try await second.type("!")
            try await second.read("that it is taken") {
                $0.standing?.writes == false && $0.notices.contains("carol has taken over the writing")
            }
            try await second.type("lost")
            try await second.read("a refusal") {
                $0.notices.last?.contains("writes; who opens the console anew does") == true
            }
            #expect(seen.text == "typed early kept!!")
            first.close()
            second.close()
        }
        await world.lab.server.stop()
    }

    private final class Typed: Sendable {
        private let bytes = Guarded<[UInt8]>([])
        func add(_ frame: ConsoleFrame) { if case .input(let new) = frame { bytes.withLock { $0 += new } } }
        var text: String { String(decoding: bytes.withLock { $0 }, as: UTF8.self) }
    }

    /// A Close frame holds 123 bytes: the rest of the sentence, with what to do, is not lost.
    @Test func aLongReasonComesWhole() async throws {
        let reason =
            "the agent of that host has begun to end, " + String(repeating: "very ", count: 60) + "and 'this' mends it"
        let world = try await World(
            patience: .milliseconds(300),
            [
                { channel, _ in
                    var last = ConsoleStanding(
                        guest: "web1",
                        ring: "ab",
                        oldest: 0,
                        next: 0,
                        connected: true,
                        readers: 1
                    )
                    try await channel.write(ConsoleFrame.note(try JSONText.encode(last)).encoded)
                    last.ending = reason
                    try await channel.write(ConsoleFrame.note(try JSONText.encode(last)).encoded)
                    try await channel.write(ConsoleFrame.end(code: 4000, reason: reason).encoded)
                    try await channel.finishWriting()
                }
            ],
            isGranted: false
        )
        let reader = try await world.reader()
        try await world.loop.run {
            try await reader.readToTheEnd()
            #expect(
                reader.standing?.ending == "b has closed the console: \(reason)",
                "\(String(describing: reader.standing))"
            )
            #expect(reader.closing.code == 4000 && reader.closing.reason.hasSuffix(" very..."), "\(reader.closing)")
        }
        await world.lab.server.stop()
    }

    @Test func aHostThatRefusesIsAskedAgainAndThenReadersAreSentThere() async throws {
        let world = try await World(patience: .milliseconds(700), [])
        let reader = try await world.reader()
        try await world.loop.run {
            try await reader.read("why") { $0.standing?.reason == "b answers: no; trying again" }
            #expect(reader.standing?.connected == false && reader.standing?.host == "b")
            try await reader.readToTheEnd()
            #expect(reader.closing == (4001, "b"))
        }
        #expect(world.openings.count >= 2)
        // Nobody reads: nobody is asked. The next reader is why it is asked again.
        let count = world.openings.count
        let next = try await world.reader()
        try await eventually("it is asked again") { world.openings.count > count }
        try await world.loop.run { next.close() }
        await world.lab.server.stop()
    }

    @Test func onlyUsersOfTheHostNameOtherHosts() async throws {
        let world = try await World([
            { channel, opening in
                try await channel.write(Self.note("cd") + Self.output("\(opening.guest) there", at: 3))
                try await Self.stay(channel)
            }
        ])
        let (host, cookie) = (world.lab.host, try await world.lab.cookie())
        let status = try await world.lab.client { client in
            try await client.ask("GET", "/consoles/web2?host=b:7", ["Host": host, "Cookie": cookie]).status
        }
        #expect(status == 403 && world.openings.isEmpty)
        let (path, loop) = ("\(world.lab.state)/console.sock", world.loop)
        try await loop.run {
            let client = try await HTTPClient.connect(to: .unix(path: path), nil, on: loop)
            defer { client.close() }
            for target in ["/consoles/web2?host=", "/consoles/web2?host=unix:/x", "/consoles/..web2?host=b"] {
                #expect(try await client.ask("GET", target, ["Host": "localhost"]).status == 400, "\(target)")
            }
            let reader = try await ConsoleClient(
                .unix(path: path),
                "localhost",
                nil,
                guest: "web2",
                query: "?host=b:7",
                on: loop
            )
            try await reader.read("what it says there") { $0.text == "web2 there" }
            #expect(reader.standing?.host == "b" && reader.start == 3)
            reader.close()
        }
        #expect(world.openings.first?.guest == "web2")
        await world.lab.server.stop()
    }

    // MARK: displays

    /// Two ends of a TLS session on the server's loop.
    private static func session(_ lab: WebLab) async throws -> (TLSChannel, TLSChannel) {
        let loop = lab.server.loop
        let (server, client) = (try lab.pki.credentials(.server), try lab.pki.credentials(.client))
        return try await loop.run {
            let (near, far) = MemoryChannel.pair(on: loop, capacity: 256 << 10)
            async let accepted = TLSChannel.handshake(over: far, credentials: server)
            let dialled = try await TLSChannel.handshake(over: near, credentials: client, hostname: "localhost")
            return (dialled, try await accepted)
        }
    }

    /// A display that says what it hears, and what the server has of it.
    private static func serve(_ lab: WebLab, _ opening: ConsoleOpening) async throws -> (String?, Bool) {
        let serve = await lab.server.console(for: opening, identity: "CN=a", mayWrite: true) { true }
        guard let serve else { return (nil, false) }
        let (near, far) = try await session(lab)
        let loop = lab.server.loop
        return try await loop.run {
            let serving = Task(executorPreference: loop) { await serve(far) }
            try await near.write(Array("hello".utf8))
            let heard = String(decoding: try await near.read(exactly: 5), as: UTF8.self)
            near.close()
            await serving.value
            return (heard, true)
        }
    }

    @Test func theBytesOfADisplayArePassedOn() async throws {
        let echo: Script = { channel, _ in
            let buffer = IOBuffer(capacity: 4096)
            while true {
                let count = try await channel.readSome(into: buffer.mutable(0..<buffer.capacity))
                if count == 0 { return }
                try await channel.write(Array(buffer.bytes(0..<count)))
            }
        }
        let world = try await World([echo])
        let opening = ConsoleOpening(guest: "web1", kind: .vnc, path: ["0a"])
        // The guest has gone on from here: its next host has the display.
        #expect(try await Self.serve(world.lab, opening) == ("hello", true))
        let asked = try #require(world.openings.first)
        #expect(asked.kind == .vnc && asked.hops == 2 && asked.path.count == 2 && asked.path.first == "0a")
        // Not round in a circle, not for ever, and not for guests that were never here.
        for change: @Sendable (inout ConsoleOpening) -> Void in [
            { $0.path = asked.path }, { $0.hops = 4 }, { $0.guest = "web2" },
            { $0.path = Array(repeating: "0a", count: 16) },
        ] {
            var other = opening
            change(&other)
            #expect(try await Self.serve(world.lab, other) == (nil, false), "\(other)")
            other.kind = .serial
            if other.hops == 4 || other.guest == "web2" || other.path.last == asked.path.last {
                let serve = await world.lab.server.console(for: other, identity: "CN=a", mayWrite: true) { true }
                #expect(serve == nil, "\(other)")
            }
        }
        await world.lab.server.stop()
    }

    @Test func aDisplayThatIsHereIsPassedOnAsLongAsItMayBe() async throws {
        let holds = Holds()
        let guest = try await DisplayLab()
        let lab = guest.lab
        let opening = ConsoleOpening(guest: "web1", kind: .vnc)
        let serve = await lab.server.console(for: opening, identity: "CN=a", mayWrite: true) { holds.value }
        let serving = try #require(serve)
        let (near, far) = try await Self.session(lab)
        let loop = lab.server.loop
        try await loop.run {
            let task = Task(executorPreference: loop) { await serving(far) }
            let greeting = try await near.read(exactly: 12)
            #expect(String(decoding: greeting, as: UTF8.self) == "RFB 003.008\n")
            // The grant is over: so is what was opened by it.
            holds.end()
            await #expect(throws: ChannelError.self) { try await near.read(exactly: 1) }
            await task.value
            near.close()
        }
        await lab.server.stop()
    }

    private final class Holds: Sendable {
        private let state = Guarded(true)
        var value: Bool { state.withLock { $0 } }
        func end() { state.withLock { $0 = false } }
    }
}
