import Glibc
import IO
import Migration
import NBD
import TLS
import TestSupport
import Testing

/// The mirror relay between QEMU's own NBD client (qemu-io) and our server over TLS.
@Suite(.timeLimit(.minutes(2)))
struct RelayTests {
    struct Setup: Sendable {
        let directory: TestDirectory
        let image: String
        let export: Export
        let relay: MirrorRelay
    }

    func withRelay(
        _ connections: Int,
        atMost: Int = 0,
        through window: (roundTrip: Duration, bytes: Int)? = nil,
        endurance: MirrorEndurance? = MirrorEndurance(),
        _ body: @escaping @Sendable (Setup) async throws -> Void
    ) async throws {
        let directory = try TestDirectory()
        let pki = try TestPKI()
        let image = directory.file("disk")
        _ = try await Tool.run(["truncate", "-s", "64M", image])
        let loops = EventLoopGroup(count: 2, name: "nbd")
        defer { loops.stop() }
        let exports = ExportTable()
        let export = Export(name: "x", backEnd: try RawFile(path: image, readOnly: false), takesCompressed: true)
        exports.add(export)
        let server = NBDServer(exports: exports, credentials: try pki.credentials(.server), loops: loops)
        let loop = loops.loops[0]
        let listener = try await loop.run {
            try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
        }
        let serving = Task(executorPreference: loop) { await server.serve(listener) }
        var address = listener.address
        var line: LongLine?
        if let window, case .inet(let host, let port) = address {
            line = try await LongLine(
                from: "127.0.0.3",
                to: host,
                ports: [port],
                roundTrip: window.roundTrip,
                window: window.bytes
            )
            address = .inet(host: "127.0.0.3", port: port)
        }
        defer { line?.stop() }
        let relay = try await MirrorRelay.start(
            socket: directory.file("s"),
            to: address,
            options: NBDClientOptions(export: "x", credentials: try pki.credentials(.client), hostname: "localhost"),
            connections: connections,
            connectionsAtMost: atMost,
            size: 64 << 20,
            endurance: endurance,
            on: loops.loops[1]
        )
        #expect(relay.connections == connections)
        try await body(Setup(directory: directory, image: image, export: export, relay: relay))
        await relay.close()
        listener.abort()
        await serving.value
    }

    func qemuIO(_ setup: Setup, _ commands: [String]) async throws -> ToolResult {
        let target = "driver=nbd,server.type=unix,server.path=\(setup.relay.socket),export=x,discard=unmap"
        return try await Tool.run(["qemu-io"] + commands.flatMap { ["-c", $0] } + ["--image-opts", target])
    }

    @Test(arguments: [1, 4])
    func whatQEMUWritesAndFlushesIsAtTheDestination(_ connections: Int) async throws {
        try await withRelay(connections) { setup in
            var commands = (0..<48).map { "aio_write -P \($0 + 1) \($0)M 1M" }
            commands += [
                "aio_flush", "write -P 0x77 100k 3k", "write -P 0x78 101k 1k", "write -z 2M 64k", "discard 3M 64k",
            ]
            commands += [
                "flush", "read -P 0x77 100k 1k", "read -P 0x78 101k 1k", "read -P 0 2M 64k", "read -P 5 4M 1M",
            ]
            let result = try await qemuIO(setup, commands)
            #expect(result.code == 0 && !result.all.contains("failed"), "\(result.all)")
            let direct = try await Tool.run(
                ["qemu-io", "-f", "raw", "-r", "-c", "read -P 0x77 100k 1k", "-c", "read -P 48 47M 1M", setup.image]
            )
            #expect(direct.code == 0 && !direct.all.contains("failed"), "\(direct.all)")
            #expect(setup.relay.counters.bytesSent == 48 << 20 + 4096)
            #expect(setup.relay.counters.bytesInFlight == 0)
        }
    }

    @Test(arguments: [0, 16])
    func moreConnectionsAreMadeWhereTheirWindowsAreTheLimit(_ most: Int) async throws {
        try await withRelay(2, atMost: most, through: (.milliseconds(20), 128 << 10)) { setup in
            let round = (0..<48).map { "aio_write -P \($0 + 1) \($0)M 1M" } + ["aio_flush"]
            let result = try await qemuIO(setup, round + round + round + ["flush", "read -P 7 6M 1M"])
            #expect(result.code == 0 && !result.all.contains("failed"), "\(result.all)")
            let count = setup.relay.connections
            #expect(most == 0 ? count == 2 : (4...most).contains(count), "\(count) connections")
            let direct = try await Tool.run(
                ["qemu-io", "-f", "raw", "-r", "-c", "read -P 1 0 1M", "-c", "read -P 48 47M 1M", setup.image]
            )
            #expect(direct.code == 0 && !direct.all.contains("failed"), "\(direct.all)")
        }
    }

    @Test func whatShrinksIsSentCompressedAndArrivesWhole() async throws {
        var endurance = MirrorEndurance()
        endurance.compression = .level(1)
        try await withRelay(2, endurance: endurance) { setup in
            let commands = (0..<16).map { "aio_write -P \($0 + 1) \($0)M 1M" }
            let odd = ["write -P 0x77 100k 3k", "write -P 0x78 20M 5000", "write -z 2M 64k", "flush"]
            let result = try await qemuIO(setup, commands + ["aio_flush"] + odd)
            #expect(result.code == 0 && !result.all.contains("failed"), "\(result.all)")
            #expect(setup.relay.counters.bytesSent > 16 << 20 && setup.relay.counters.bytesOnLine < 1 << 20)
            let direct = try await Tool.run(
                [
                    "qemu-io", "-f", "raw", "-r", "-c", "read -P 0x77 100k 3k", "-c", "read -P 0x78 20M 5000", "-c",
                    "read -P 0 2M 64k",
                ]
                    + ["-c", "read -P 16 15M 1M", "-c", "read -P 3 2112k 960k", setup.image]
            )
            #expect(direct.code == 0 && !direct.all.contains("failed"), "\(direct.all)")
        }
    }

    @Test func zeroesAreSentAsZeroes() async throws {
        try await withRelay(2) { setup in
            let result = try await qemuIO(setup, ["write -P 0 0 8M", "flush"])
            #expect(result.code == 0, "\(result.all)")
            #expect(setup.relay.counters.bytesSent == 0)
            #expect(setup.relay.counters.zeroBytes == 8 << 20)
            var status = stat()
            #expect(stat(setup.image, &status) == 0 && status.st_blocks == 0)
        }
    }

    @Test func afterALossEveryRequestFailsEvenAFlush() async throws {
        try await withRelay(2, endurance: nil) { setup in
            #expect(try await qemuIO(setup, ["write -P 1 0 1M", "flush"]).code == 0)
            await setup.export.close()
            try await eventually("the relay notices") { await setup.relay.failure() != nil }
            let result = try await qemuIO(setup, ["write -P 2 0 1M", "flush"])
            #expect(result.code != 0 || result.all.contains("error"), "\(result.all)")
            #expect(await setup.relay.failure()?.contains("lost") == true)
        }
    }

    @Test func theStreamKeepsItsReturnPathWhenOneDirectionHasEnded() async throws {
        let loop = EventLoop(name: "test")
        defer { loop.stop() }
        try await loop.run {
            let (source, near) = MemoryChannel.pair(on: loop)
            let (far, destination) = MemoryChannel.pair(on: loop)
            let relay = Task(executorPreference: loop) { try await StreamRelay.run(near, far) }
            let data = (0..<200_000).map { UInt8(truncatingIfNeeded: $0 / 7) }
            async let sent: Void = source.write(data)
            #expect(try await destination.read(exactly: data.count) == data)
            try await sent
            try await source.finishWriting()
            let buffer = IOBuffer(capacity: 16)
            #expect(try await destination.readSome(into: buffer.mutable(0..<16)) == 0)
            try await destination.write(Array("loaded".utf8))
            #expect(try await source.read(exactly: 6) == Array("loaded".utf8))
            try await destination.finishWriting()
            try await relay.value
        }
    }

    @Test func aBrokenStreamEndsBothDirections() async throws {
        let loop = EventLoop(name: "test")
        defer { loop.stop() }
        try await loop.run {
            let (source, near) = MemoryChannel.pair(on: loop)
            let (far, destination) = MemoryChannel.pair(on: loop)
            let relay = Task(executorPreference: loop) { try await StreamRelay.run(near, far) }
            try await source.write([1])
            #expect(try await destination.read(exactly: 1) == [1])
            far.abort(ChannelError(.closed, "cut"))
            await #expect(throws: ChannelError.self) { try await relay.value }
            await #expect(throws: ChannelError.self) { try await source.write([UInt8](repeating: 0, count: 1 << 20)) }
        }
    }
}
