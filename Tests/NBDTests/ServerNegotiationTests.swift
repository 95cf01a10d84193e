import Glibc
import IO
import TLS
import TestSupport
import Testing

@testable import NBD

/// Plays a client byte by byte against a real server over memory.
struct RawClient: Sendable {
    var channel: any Channel

    static func option(_ number: UInt32, _ payload: [UInt8] = []) -> [UInt8] {
        var writer = MessageWriter()
        writer.append(NBDWire.optionMagic)
        writer.append(number)
        writer.append(UInt32(payload.count))
        writer.append(payload)
        return writer.bytes
    }

    static func name(_ text: String, _ rest: [UInt8] = []) -> [UInt8] {
        var writer = MessageWriter()
        writer.append(UInt32(text.utf8.count))
        writer.append(text)
        writer.append(rest)
        return writer.bytes
    }

    func greet(flags: UInt32 = 3) async throws {
        #expect(try await channel.read(exactly: 18) == ServerHandshake.greeting)
        var writer = MessageWriter()
        writer.append(flags)
        try await channel.write(writer.bytes)
    }

    /// Enters the transmission phase of an export with extended headers.
    func enterExtended(_ export: String) async throws {
        try await greet()
        #expect(try await ask(11, []) == NBDOptionReply.ack)
        #expect(try await ask(7, Self.name(export, [0, 0])) == NBDOptionReply.info)
        #expect(try await reply().type == NBDOptionReply.ack)
    }

    func reply() async throws -> (option: UInt32, type: UInt32, payload: [UInt8]) {
        var header = MessageReader(try await channel.read(exactly: 20))
        #expect(header.integer(UInt64.self) == NBDWire.optionReplyMagic)
        let option = header.integer(UInt32.self)!
        let type = header.integer(UInt32.self)!
        return (option, type, try await channel.read(exactly: Int(header.integer(UInt32.self)!)))
    }

    func ask(_ number: UInt32, _ payload: [UInt8] = []) async throws -> UInt32 {
        try await channel.write(Self.option(number, payload))
        let reply = try await reply()
        #expect(reply.option == number)
        return reply.type
    }

    /// Whether the server closed the connection.
    func isClosed() async -> Bool {
        do {
            _ = try await channel.read(exactly: 1)
            return false
        } catch { return true }
    }
}

@Suite(.timeLimit(.minutes(1)))
struct ServerNegotiationTests {
    let pki: TestPKI
    let directory: TestDirectory
    let exports = ExportTable()

    init() async throws {
        pki = try TestPKI()
        directory = try TestDirectory()
        _ = try await Tool.run(["truncate", "-s", "1M", directory.file("disk")])
        exports.add(
            Export(name: "disk", summary: "a disk", backEnd: try RawFile(path: directory.file("disk"), readOnly: false))
        )
    }

    func withClient(
        tls: Bool,
        limits: NBDServer.Limits = .init(),
        _ body: @escaping @Sendable (RawClient, EventLoop) async throws -> Void
    ) async throws {
        let credentials = tls ? try pki.credentials(.server) : nil
        let exports = exports
        try await onLoop { loop in
            let group = EventLoopGroup(count: 1, name: "nbd")
            defer { group.stop() }
            let server = NBDServer(exports: exports, credentials: credentials, loops: group, limits: limits)
            let (near, far) = MemoryChannel.pair(on: loop)
            let serving = Task(executorPreference: loop) { try? await server.serve(far) }
            try await body(RawClient(channel: near), loop)
            near.close()
            await serving.value
        }
    }

    @Test(arguments: [UInt32(3), 6, 7, 8, 9, 10, 4, 99, 0xffff_ffff])
    func beforeTLSEveryOptionButStartTLSAndAbortIsRefusedWithTheProtocolsError(_ option: UInt32) async throws {
        try await withClient(tls: true) { client, _ in
            try await client.greet()
            #expect(try await client.ask(option, Array("payload".utf8)) == NBDOptionReply.tlsRequired)
            #expect(try await client.ask(2) == NBDOptionReply.ack)
            #expect(await client.isClosed())
        }
    }

    @Test func beforeTLSExportNameIsAnsweredByDisconnecting() async throws {
        try await withClient(tls: true) { client, _ in
            try await client.greet()
            try await client.channel.write(RawClient.option(1, Array("disk".utf8)))
            #expect(await client.isClosed())
        }
    }

    @Test func startTLSWithDataOrTwiceIsInvalidAndWithoutCredentialsAgainstThePolicy() async throws {
        let pki = pki
        try await withClient(tls: true) { client, _ in
            try await client.greet()
            #expect(try await client.ask(5, [1]) == NBDOptionReply.invalid)
            #expect(try await client.ask(5) == NBDOptionReply.ack)
            let secure = try await TLSChannel.handshake(
                over: client.channel,
                credentials: pki.credentials(.client),
                hostname: "localhost"
            )
            let inside = RawClient(channel: secure)
            #expect(try await inside.ask(5) == NBDOptionReply.invalid)
            #expect(try await inside.ask(99) == NBDOptionReply.unsupported)
            #expect(try await inside.ask(7, RawClient.name("disk", [0, 0])) == NBDOptionReply.info)
        }
        try await withClient(tls: false) { client, _ in
            try await client.greet()
            #expect(try await client.ask(5) == NBDOptionReply.policy)
        }
    }

    @Test func clearTextThatFollowsStartTLSIsNeverUnderstood() async throws {
        try await withClient(tls: true) { client, _ in
            try await client.greet()
            try await client.channel.write(RawClient.option(5) + RawClient.option(3))
            #expect(try await client.reply().type == NBDOptionReply.ack)
            // The second option was taken as the beginning of the TLS handshake, which fails.
            let answer = try? await client.channel.read(exactly: 8)
            #expect(answer != nil && answer!.first == 21 || answer == nil, "only a TLS alert may come")
        }
    }

    @Test func aClientWithUnknownFlagsIsDropped() async throws {
        try await withClient(tls: false) { client, _ in
            try await client.greet(flags: 7)
            #expect(await client.isClosed())
        }
    }

    @Test func aWrongMagicIsAnsweredByDisconnecting() async throws {
        try await withClient(tls: false) { client, _ in
            try await client.greet()
            try await client.channel.write([UInt8](repeating: 0x20, count: 16))
            #expect(await client.isClosed())
        }
    }

    @Test func anOversizedOptionIsDrainedOrDroppedAndNeverStored() async throws {
        try await withClient(tls: false) { client, _ in
            try await client.greet()
            #expect(try await client.ask(7, [UInt8](repeating: 1, count: 9000)) == NBDOptionReply.tooBig)
            #expect(try await client.ask(99) == NBDOptionReply.unsupported)
            var huge = MessageWriter()
            huge.append(NBDWire.optionMagic)
            huge.append(UInt32(7))
            huge.append(UInt32.max)
            try await client.channel.write(huge.bytes)
            #expect(await client.isClosed())
        }
    }

    @Test func malformedRequestsForInformationAreInvalidAndTheSessionGoesOn() async throws {
        try await withClient(tls: false) { client, _ in
            try await client.greet()
            let bad: [[UInt8]] = [
                [], [0, 0], RawClient.name("disk"), RawClient.name("disk", [0, 9]),
                RawClient.name("disk", [0, 0, 1]), [0xff, 0xff, 0xff, 0xff, 0, 0], RawClient.name("di\0sk", [0, 0]),
                RawClient.name(String(repeating: "n", count: 4097), [0, 0]),
            ]
            for payload in bad { #expect(try await client.ask(6, payload) == NBDOptionReply.invalid) }
            #expect(try await client.ask(6, RawClient.name("nothing", [0, 0])) == NBDOptionReply.unknown)
            #expect(try await client.ask(6, RawClient.name("disk", [0, 0])) == NBDOptionReply.info)
            #expect(try await client.reply().type == NBDOptionReply.ack)
        }
    }

    @Test func exportNameLeadsToSimpleRepliesWithAndWithoutTheZeroes() async throws {
        for flags in [UInt32(3), 1] {
            try await withClient(tls: false) { client, _ in
                try await client.greet(flags: flags)
                try await client.channel.write(RawClient.option(1, Array("disk".utf8)))
                let reply = try await client.channel.read(exactly: flags == 3 ? 10 : 134)
                #expect(Array(reply[..<8]) == [0, 0, 0, 0, 0, 0x10, 0, 0])
                #expect(reply[10...].allSatisfy { $0 == 0 })
                let buffer = IOBuffer(capacity: 28)
                NBDRequest(.read, cookie: 77, offset: 0, length: 16).encode(into: buffer.mutable(0..<28), form: .simple)
                try await client.channel.write(Array(buffer.bytes(0..<28)))
                let data = try await client.channel.read(exactly: 32)
                #expect(Array(data[..<4]) == [0x67, 0x44, 0x66, 0x98])
                #expect(data[8..<16].elementsEqual([0, 0, 0, 0, 0, 0, 0, 77]))
                // A request that makes no sense is answered, a wrong magic is not.
                NBDRequest(.read, cookie: 78, offset: 1 << 40, length: 16).encode(
                    into: buffer.mutable(0..<28),
                    form: .simple
                )
                try await client.channel.write(Array(buffer.bytes(0..<28)))
                #expect(Array(try await client.channel.read(exactly: 16)[4..<8]) == [0, 0, 0, 22])
                try await client.channel.write([UInt8](repeating: 1, count: 28))
                #expect(await client.isClosed())
            }
        }
    }

    @Test func metadataContextsNeedStructuredRepliesAndKnowTheirNames() async throws {
        try await withClient(tls: false) { client, _ in
            try await client.greet()
            let base = RawClient.name("disk", [0, 0, 0, 1] + RawClient.name("base:allocation"))
            #expect(try await client.ask(10, base) == NBDOptionReply.invalid)
            #expect(try await client.ask(8, [1]) == NBDOptionReply.invalid)
            #expect(try await client.ask(8) == NBDOptionReply.ack)
            #expect(try await client.ask(10, base) == NBDOptionReply.metaContext)
            #expect(try await client.reply().type == NBDOptionReply.ack)
            let other = RawClient.name("disk", [0, 0, 0, 1] + RawClient.name("other:thing"))
            #expect(try await client.ask(10, other) == NBDOptionReply.ack)
            #expect(
                try await client.ask(10, RawClient.name("disk", [0xff, 0xff, 0xff, 0xff])) == NBDOptionReply.invalid
            )
        }
    }

    @Test func aSilentClientIsDroppedAtTheDeadline() async throws {
        var limits = NBDServer.Limits()
        limits.handshake = .milliseconds(50)
        try await withClient(tls: false, limits: limits) { client, _ in
            _ = try await client.channel.read(exactly: 18)
            #expect(await client.isClosed())
        }
    }

    @Test func anExportThatThePeerMayNotUseDoesNotExistForIt() async throws {
        let exports = ExportTable()
        exports.add(
            Export(name: "secret", backEnd: try RawFile(path: directory.file("disk"), readOnly: true)) { _ in
                .denied("It is a secret")
            }
        )
        for name in ["secret", ""] {
            guard case .nothing = exports.find(name, for: nil, isSecure: true) else {
                Issue.record("the export was found")
                return
            }
        }
        #expect(exports.list(for: nil, isSecure: true).isEmpty)
    }
}
