import FoundationEssentials
import IO
import Migration
import TestSupport
import Testing

@testable import Emulator

@Suite(.timeLimit(.minutes(1)))
struct MessageTests {
    /// One of each, by its name in `docs/protocol.md`.
    private enum Kind: String, CaseIterable {
        case hello, welcome, probe, secrets, offer, shadow, rehearsed, need, file, ready, mirrored, readBack, stream,
            prepared,
            release
        case refused, owned, console, grant, open, opened, done, abort, overruled, ping, pong, host

        /// A message that is added and has no kind does not compile.
        init(_ message: Message) {
            self =
                switch message {
                case .hello: .hello
                case .welcome: .welcome
                case .probe: .probe
                case .secrets: .secrets
                case .offer: .offer
                case .shadow: .shadow
                case .rehearsed: .rehearsed
                case .need: .need
                case .file: .file
                case .ready: .ready
                case .mirrored: .mirrored
                case .readBack: .readBack
                case .stream: .stream
                case .prepared: .prepared
                case .release: .release
                case .refused: .refused
                case .owned: .owned
                case .console: .console
                case .grant: .grant
                case .open: .open
                case .opened: .opened
                case .done: .done
                case .abort: .abort
                case .overruled: .overruled
                case .ping: .ping
                case .pong: .pong
                case .host: .host
                }
        }
    }

    private static let all: [Message] = [
        .hello(.init(role: .stream, migration: "1-a", index: 2)),
        .welcome(.init(state: .prepared, nbdPort: 10809, takenBy: "root")), .probe(65536), .secrets(["s": "aGk="]),
        .offer(
            .init(
                guest: "web1",
                commandLine: GuestCommandLine(arguments: ["qemu-system-x86_64", "-m", "1G"], directory: "/"),
                machine: "pc-i440fx-7.2",
                emulatorVersion: "7.2.22",
                disks: [.init(name: "disk0", size: 1 << 40, allocated: 5, path: "a.raw")],
                files: [.init(path: "k", size: 1, digest: "ab")],
                hasUUID: true
            )
        ),
        .shadow(shadow), .rehearsed(.init(backing: ["/base.qcow2": "ab"])), .need([2, 0]), .file(3),
        .ready(
            .init(reasons: ["no room"], nbdPort: 10809, exports: ["disk0": "1-a/disk0"], keepsBacking: ["disk0"])
        ),
        .mirrored, .readBack(.init(done: 1, total: 2)), .stream,
        .prepared(.init(proofs: ["disk0": .init(runs: [3, 1], sum: "ab")], isFull: true)),
        .release(.init(digests: ["disk0": "ab"], runState: .paused)), .refused("why"),
        .owned(.init(digests: ["disk0": "ab"], sinceResumed: 1.5)),
        .console(.init(ring: "0a1b", offset: 1 << 40, bytes: [0, 27, 255])),
        .grant(.init(ConsoleGrant(), write: false, seconds: 7)),
        .open(
            .init(
                guest: "web1",
                kind: .vnc,
                grant: ConsoleGrant(),
                view: true,
                from: 7,
                ring: "ab",
                path: ["cd"],
                hops: 2
            )
        ),
        .opened, .done, .overruled("root"), .abort("why"),
        .ping,
        .pong, .host(.init(1, .host(nil))),
    ]

    private static var shadow: Message.Shadow {
        var fingerprint = MachineFingerprint()
        fingerprint.machine = "pc-i440fx-7.2"
        return .init(
            fingerprint: fingerprint,
            emulatorVersion: "7.2.22",
            changes: ["a"],
            warnings: ["b"],
            backing: ["/base.qcow2"],
            clock: 1,
            free: 2
        )
    }

    @Test func everyMessageComesThroughUnchanged() async throws {
        #expect(Set(Self.all.map { Kind($0) }) == Set(Kind.allCases))
        let loop = EventLoop(name: "test")
        defer { loop.stop() }
        try await loop.run {
            let (a, b) = MemoryChannel.pair(on: loop)
            let near = MessageConnection(a)
            let far = MessageConnection(b)
            for message in Self.all {
                async let sent: Void = near.send(message)
                #expect(try await far.receiveMessage() == message)
                try await sent
            }
        }
    }

    @Test func theEndOfAConsoleIsWhatItShouldBe() throws {
        #expect(ConsoleTail(ring: "0a1b", offset: 7, bytes: [0, 27, 255]).bytes == [0, 27, 255])
        let many = [UInt8](repeating: 1, count: ConsoleTail.most + 1)
        for (ring, offset, bytes) in [
            ("", UInt64(0), [UInt8(1)]), ("0A", 0, [1]), ("../x", 0, [1]), (String(repeating: "a", count: 33), 0, [1]),
            ("ab", .max, [1]), ("ab", 0, many),
        ] {
            #expect(ConsoleTail(ring: ring, offset: offset, bytes: bytes).bytes == nil, "\(ring) \(offset)")
        }
        var tail = ConsoleTail(ring: "ab", offset: 0, bytes: [])
        tail.data = "no base64!"
        #expect(tail.bytes == nil)
        #expect(tail.typed == [])
        tail.add(typed: [13, 10])
        #expect(tail.typed == [13, 10])
        tail.add(typed: many)
        #expect(tail.typed.count == ConsoleTail.most)
        for input in ["no base64!", String(repeating: "A", count: 2 * ConsoleTail.most + 4)] {
            tail.input = input
            #expect(tail.typed == [])
        }
    }

    @Test func whoOpensAConsoleSaysWhatItMay() {
        var opening = ConsoleOpening(guest: "web1", kind: .serial, from: 1 << 53, ring: "0a", path: ["0b"], hops: 4)
        #expect(opening.isPlausible)
        for change: (inout ConsoleOpening) -> Void in [
            { $0.guest = "../web1" }, { $0.guest = "" }, { $0.from = 1 << 53 + 1 }, { $0.ring = "xy" },
            { $0.ring = "" },
            { $0.path = ["no mark"] }, { $0.path = Array(repeating: "0b", count: 17) }, { $0.hops = 0 },
            { $0.hops = 5 },
            { $0.hops = .max },
        ] {
            let before = opening
            change(&opening)
            #expect(!opening.isPlausible, "\(opening)")
            opening = before
        }
    }

    /// A sentence of the other side's ends up on a terminal, in a journal, in a report.
    @Test(arguments: ["ABORT", "REFUSED", "OVERRULED"])
    func aSentenceIsOneLineThatDoesNothingToATerminal(_ type: String) throws {
        let body =
            "no\\nGuest 'web1' runs on localhost.\\u001b[2J\\u202e\\u0007" + String(repeating: "x", count: 1 << 20)
        let message = try JSONDecoder().decode(
            Message.self,
            from: Data("{\"type\":\"\(type)\",\"body\":\"\(body)\"}".utf8)
        )
        let sentence: String
        switch message {
        case .abort(let text), .refused(let text), .overruled(let text): sentence = text
        default: sentence = ""
        }
        #expect(sentence.hasPrefix("no?Guest 'web1' runs on localhost.?[2J??xx") && sentence.utf8.count < 5000)
    }

    @Test func whatIsSaidAboutAHostComesThroughUnchanged() throws {
        let state = HostState(
            memory: 8,
            freeMemory: 7,
            promisedMemory: 6,
            freeDisk: 5,
            promisedDisk: 4,
            processors: 3,
            guests: 2,
            incoming: 1,
            mostIncoming: 9,
            cordon: "why"
        )
        let room = HostMessage.Reserve(guest: "web1", usage: .init(memory: 1), allocated: .max, seconds: 60)
        let contents: [(HostMessage.Content, String)] = [
            (.host(nil), "HOST"), (.host(state), "HOST"), (.reserve(room), "RESERVE"),
            (.reserved(.init(id: "ab", seconds: 60)), "RESERVED"), (.unreserve("ab"), "UNRESERVE"),
            (.turn("web1"), "TURN"), (.turned, "TURNED"), (.recall(.init(guests: nil, address: "a:1")), "RECALL"),
            (.recall(.init(guests: ["web1"], address: "a:1", isQuestion: true)), "RECALL"),
            (.recalled([.init(guest: "web1", reason: "busy", isLater: true)]), "RECALLED"), (.denied("why"), "DENIED"),
            (.members(.init(list: "{}", signature: "ab")), "MEMBERS"),
            (.renew("request"), "RENEW"), (.renewed(.init(certificate: "one", authority: "two")), "RENEWED"),
            (.examine(.init(address: "host-a:10808", measuresDisk: true)), "EXAMINE"),
            (
                .examined(.init(findings: [Finding(.space, .warn, here: "1", remedy: "x")], clock: 1, nbdPort: 2)),
                "EXAMINED"
            ),
        ]
        for (index, (content, name)) in contents.enumerated() {
            let message = Message.host(HostMessage(UInt32(index), content))
            #expect(message.name == name)
            #expect(JSONText.decode(Message.self, from: try JSONText.encode(message)) == message)
        }
    }

    /// A number that is none must not become one.
    @Test(arguments: [
        #"{"type":"RESERVE","body":{"number":1,"content":{"guest":"a","usage":{"memory":-1,"processors":1,"disk":1},"allocated":1,"seconds":1}}}"#,
        #"{"type":"RESERVE","body":{"number":1,"content":{"guest":"a","usage":{"memory":1e40,"processors":1,"disk":1},"allocated":1,"seconds":1}}}"#,
        #"{"type":"RESERVE","body":{"number":-1,"content":{}}}"#, #"{"type":"RESERVE"}"#, #"{"type":"HOST"}"#,
        #"{"type":"TURN","body":{"number":4294967296,"content":"a"}}"#, #"{"type":"DENIED","body":"why"}"#,
    ])
    func aMalformedQuestionIsNone(_ text: String) {
        #expect(JSONText.decode(Message.self, from: Array(text.utf8)) == nil)
    }

    /// What has no body has nothing but its name to be told apart by.
    @Test func eachMessageBearsItsDocumentedName() throws {
        for message in Self.all {
            let text = String(decoding: try JSONText.encode(message), as: UTF8.self)
            #expect(text.hasSuffix(#""type":"\#(Kind(message).rawValue.uppercased())"}"#), "\(text)")
        }
    }

    @Test(arguments: [
        [UInt8]([0, 0, 0, 2, 9]) + Array("{}".utf8), [0xff, 0xff, 0xff, 0xff, 1], [0, 0x10, 0, 1, 2],
        [0, 0, 0, 2, 1] + Array("{}".utf8), [0, 0, 0, 16, 1] + Array(#"{"type":"BOGUS"}"#.utf8),
        Array("GET / HTTP/1.1\r\n\r\n".utf8),
    ])
    func whatIsNoFrameIsAViolationAndStoresNothing(_ bytes: [UInt8]) async throws {
        let loop = EventLoop(name: "test")
        defer { loop.stop() }
        try await loop.run {
            let (a, b) = MemoryChannel.pair(on: loop)
            try await a.write(bytes)
            try await a.finishWriting()
            let error = await #expect(throws: ChannelError.self) { _ = try await MessageConnection(b).receive() }
            #expect(error?.code == .protocolViolation)
        }
    }
}
