import Emulator
import IO
import Migration
import TestSupport
import Testing

@Suite(.timeLimit(.minutes(1)))
struct MessageTests {
    static let all: [Message] = [
        .hello(.init(role: .control, migration: "1-a")), .welcome(.init(state: .new, takenBy: "root")),
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
        .need([0]), .file(0), .ready(.init(reasons: [], nbdPort: 10809, exports: ["disk0": "1-a/disk0"])), .mirrored,
        .stream,
        .prepared(.init(proofs: ["disk0": .init(runs: [3, 1], sum: "ab")], isFull: true)),
        .release(.init(digests: ["disk0": "ab"])), .refused("why"), .owned(.init(digests: ["disk0": "ab"])), .done,
        .overruled("root"), .abort("why"), .ping, .pong,
    ]

    @Test func everyMessageComesThroughUnchanged() async throws {
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
