import Glibc
import IO
import Synchronization
import TLS
import TestSupport
import Testing

@testable import NBD

/// What a server does for and against its clients, beyond single requests.
@Suite(.timeLimit(.minutes(2)))
struct ServerBehaviourTests {
    /// A back end whose slow work waits until it is let through.
    final class GatedDisk: BackEnd {
        let size: UInt64 = 1 << 20
        let isReadOnly = false
        let entered = Atomic<Int>(0)
        let flushes = Atomic<Int>(0)
        private let isOpen = Atomic<Bool>(false)
        private let loop: EventLoop

        init(_ loop: EventLoop) { self.loop = loop }

        func open() { isOpen.store(true, ordering: .sequentiallyConsistent) }

        private func pass() async {
            entered.wrappingAdd(1, ordering: .sequentiallyConsistent)
            while !isOpen.load(ordering: .sequentiallyConsistent) { await loop.sleep(for: .milliseconds(1)) }
        }
        func tryRead(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws -> Bool { false }
        func read(into payload: Payload, at offset: UInt64) async throws { await pass() }
        func tryWrite(_ payload: Payload, at offset: UInt64, fua: Bool) throws -> Bool { false }
        func write(_ payload: Payload, at offset: UInt64, fua: Bool) async throws { await pass() }
        func zero(at offset: UInt64, count: UInt64, _ options: ZeroOptions) async throws { await pass() }
        func trim(at offset: UInt64, count: UInt64, fua: Bool) async throws { await pass() }
        func flush() async throws { flushes.wrappingAdd(1, ordering: .sequentiallyConsistent) }
        func extents(at offset: UInt64, count: UInt64, limit: Int) async throws -> [Extent] { [] }
    }

    static func connect(
        _ server: NBDServer,
        _ loop: EventLoop,
        _ options: NBDClientOptions
    ) async throws -> NBDConnection {
        let (near, far) = MemoryChannel.pair(on: loop)
        Task(executorPreference: loop) { try? await server.serve(far) }
        return try await NBDConnection.open(over: near, options)
    }

    @Test func accessIsDecidedForEachExportByNameAlternativeNameAndKeyUser() async throws {
        let peers = [
            TLSPeer(distinguishedName: "CN=admin"),
            TLSPeer(distinguishedName: "CN=x", alternativeNames: ["DNS:backup"]),
            TLSPeer(pskUser: "alice"),
        ]
        let store = ObjectStore()
        try store.add(ObjectDescription(parsing: "authz-simple,id=admin,identity=CN=admin"))
        try store.add(
            ObjectDescription(
                parsing: "authz-list,id=readers,rules.0.match=DNS:backup,rules.0.policy=allow,rules.1.match=alice,"
                    + "rules.1.policy=allow"
            )
        )
        @Sendable func passes(_ id: String, _ peer: TLSPeer) -> Bool {
            (try? AccessControl(objects: store, authorization: id).check(peer)) != nil
        }
        let exports = ExportTable()
        let disk = try RawFile(memory: 1 << 20)
        for isHidden in [false, true] {
            exports.add(
                Export(name: isHidden ? "hidden" : "open", backEnd: disk, isHidden: isHidden) { peer in
                    guard let peer else { return .denied("no name") }
                    if passes("admin", peer) { return .readWrite }
                    return passes("readers", peer) ? .readOnly : .denied("not on the list")
                }
            )
        }
        func finding(_ name: String, _ peer: TLSPeer?) -> ExportTable.Finding {
            exports.find(name, for: peer, isSecure: peer != nil)
        }
        guard case .found(_, .readWrite) = finding("open", peers[0]) else {
            throw TestFailure("the admin may not write")
        }
        for peer in peers[1...] {
            guard case .found(_, .readOnly) = finding("open", peer) else {
                throw TestFailure("\(peer.name) may not read")
            }
        }
        guard case .denied(let reason) = finding("open", TLSPeer(pskUser: "mallory")), reason == "not on the list",
            case .nothing = finding("hidden", TLSPeer(pskUser: "mallory")), case .denied = finding("open", nil)
        else { throw TestFailure("strangers get in") }
        #expect(exports.list(for: TLSPeer(pskUser: "mallory"), isSecure: true).isEmpty)
        #expect(exports.list(for: peers[2], isSecure: true).count == 2)
    }

    @Test func aPeerThatIsRefusedIsToldWhy() async throws {
        let pki = try TestPKI()
        let store = ObjectStore()
        try store.add(ObjectDescription(parsing: "authz-simple,id=a,identity=CN=somebody-else"))
        let exports = ExportTable()
        exports.add(Export(name: "disk", backEnd: try RawFile(memory: 1 << 20)))
        let credentials = try pki.credentials(.server)
        let options = NBDClientOptions(export: "disk", credentials: try pki.credentials(.client), hostname: "localhost")
        try await onLoop { loop in
            let server = NBDServer(
                exports: exports,
                credentials: credentials,
                access: AccessControl(objects: store, authorization: "a"),
                loops: EventLoopGroup(sharing: loop)
            )
            let error = await #expect(throws: ChannelError.self) { _ = try await Self.connect(server, loop, options) }
            #expect(error?.message.contains("denied by object 'a'") == true, "\(error?.message ?? "")")
        }
    }

    @Test func withSelectiveTLSAnExportThatRequiresItIsOnlyThereWithinIt() async throws {
        let pki = try TestPKI()
        let exports = ExportTable()
        exports.add(Export(name: "open", backEnd: try RawFile(memory: 1 << 20)))
        exports.add(Export(name: "safe", backEnd: try RawFile(memory: 1 << 20), requiresTLS: true))
        let credentials = try pki.credentials(.server)
        let client = try pki.credentials(.client)
        try await onLoop { loop in
            let server = NBDServer(
                exports: exports,
                credentials: credentials,
                mode: .perExport,
                loops: EventLoopGroup(sharing: loop)
            )
            func negotiate(_ options: NBDClientOptions) async throws -> NBDNegotiation {
                let (near, far) = MemoryChannel.pair(on: loop)
                Task(executorPreference: loop) { try? await server.serve(far) }
                return try await NBDNegotiation.start(over: near, options)
            }
            let plain = try await negotiate(NBDClientOptions(export: "open"))
            #expect(try await plain.list().map(\.name) == ["open"])
            let error = await #expect(throws: ChannelError.self) { _ = try await plain.info("safe") }
            #expect(error?.message.contains("requires TLS") == true)
            #expect(try await plain.info("open").size == 1 << 20)
            await plain.abort()
            let secure = try await negotiate(
                NBDClientOptions(export: "safe", credentials: client, hostname: "localhost")
            )
            #expect(try await secure.list().map(\.name) == ["open", "safe"])
            await secure.abort()
        }
    }

    @Test func aDrainingServerFinishesWhatIsUnderWayAndRefusesWhatIsNew() async throws {
        try await onLoop { loop in
            let disk = GatedDisk(loop)
            let exports = ExportTable()
            exports.add(Export(name: "disk", backEnd: disk))
            let server = NBDServer(exports: exports, credentials: nil, loops: EventLoopGroup(sharing: loop))
            let connection = try await Self.connect(server, loop, NBDClientOptions(export: "disk"))
            let (near, far) = MemoryChannel.pair(on: loop)
            Task(executorPreference: loop) { try? await server.serve(far) }
            let negotiation = try await NBDNegotiation.start(over: near, NBDClientOptions(export: "disk"))
            let writing = Task(executorPreference: loop) {
                try await connection.write(Payload(IOBuffer(capacity: 512), 0..<512), at: 0)
            }
            try await eventually("the write is under way") { disk.entered.load(ordering: .sequentiallyConsistent) == 1 }
            let draining = Task(executorPreference: loop) { await server.drain(grace: .seconds(30)) }
            await loop.sleep(for: .milliseconds(5))
            let refused = await #expect(throws: NBDError.self) {
                try await connection.read(into: Payload(IOBuffer(capacity: 512), 0..<512), at: 0)
            }
            #expect(refused?.number == .shutdown)
            let option = await #expect(throws: ChannelError.self) { _ = try await negotiation.list() }
            #expect(option?.message.contains("shutting down") == true)
            await negotiation.abort()
            disk.open()
            try await writing.value
            await connection.disconnect()
            await draining.value
            #expect(disk.flushes.load(ordering: .sequentiallyConsistent) == 1)
        }
    }

    @Test func anExclusiveExportTakesOneConnectionAndSaysSo() async throws {
        try await onLoop { loop in
            let exports = ExportTable()
            exports.add(Export(name: "disk", backEnd: try RawFile(memory: 1 << 20), isExclusive: true))
            let server = NBDServer(exports: exports, credentials: nil, loops: EventLoopGroup(sharing: loop))
            let first = try await Self.connect(server, loop, NBDClientOptions(export: "disk"))
            #expect(!first.flags.contains(.canMultiConn))
            let error = await #expect(throws: ChannelError.self) {
                _ = try await Self.connect(server, loop, NBDClientOptions(export: "disk"))
            }
            #expect(error?.message.contains("in use") == true, "\(error?.message ?? "")")
            await first.disconnect()
            try await eventually("the export is free") { exports.all[0].connections == 0 }
            let second = try await Self.connect(server, loop, NBDClientOptions(export: "disk"))
            await second.disconnect()
        }
    }

    @Test func thereIsNoPlaceBeyondTheLimitAlsoForThoseWhoNegotiateAtOnce() async throws {
        try await onLoop { loop in
            var limits = NBDServer.Limits()
            limits.connections = 2
            let exports = ExportTable()
            exports.add(Export(name: "disk", backEnd: try RawFile(memory: 1 << 20)))
            let server = NBDServer(
                exports: exports,
                credentials: nil,
                loops: EventLoopGroup(sharing: loop),
                limits: limits
            )
            let opened = await withTaskGroup(of: Bool.self) { group in
                for _ in 0..<8 {
                    group.addTask(executorPreference: loop) {
                        (try? await Self.connect(server, loop, NBDClientOptions(export: "disk"))) != nil
                    }
                }
                return await group.reduce(into: 0) { $0 += $1 ? 1 : 0 }
            }
            #expect(opened == 2)
        }
    }

    @Test func whoComesWhenAllPlacesAreTakenWaitsForOneAndIsToldWhenThereIsNone() async throws {
        try await onLoop { loop in
            for isExclusive in [false, true] {
                var limits = NBDServer.Limits()
                (limits.connections, limits.patience, limits.handshake) = (1, .seconds(60), .seconds(120))
                let exports = ExportTable()
                let disk = try RawFile(memory: 1 << 20)
                exports.add(Export(name: "disk", backEnd: disk, isExclusive: isExclusive))
                func server() -> NBDServer {
                    NBDServer(
                        exports: exports,
                        credentials: nil,
                        loops: EventLoopGroup(sharing: loop),
                        limits: limits
                    )
                }
                let patient = server()
                var held = try await Self.connect(patient, loop, NBDClientOptions(export: "disk"))
                // One after the other, each as the one before it goes.
                for _ in 0..<20 {
                    let next = Task(executorPreference: loop) {
                        try await Self.connect(patient, loop, NBDClientOptions(export: "disk"))
                    }
                    try await eventually("the next one is there") { patient.connectionCount == 2 }
                    #expect(patient.exportConnectionCount == 1)
                    await held.disconnect()
                    held = try await next.value
                }
                await held.disconnect()
                limits.patience = .milliseconds(50)
                let brisk = server()
                let first = try await Self.connect(brisk, loop, NBDClientOptions(export: "disk"))
                let error = await #expect(throws: ChannelError.self) {
                    _ = try await Self.connect(brisk, loop, NBDClientOptions(export: "disk"))
                }
                let words = isExclusive ? "in use" : "limit of 1 connections to this server"
                #expect(error?.message.contains(words) == true, "\(error?.message ?? "")")
                await first.disconnect()
            }
        }
    }

    @Test func holesAreLeftOutOfReadsAndDFGetsThemAsData() async throws {
        try await onLoop { loop in
            let disk = try RawFile(memory: 1 << 20)
            let exports = ExportTable()
            exports.add(Export(name: "disk", backEnd: disk))
            let server = NBDServer(exports: exports, credentials: nil, loops: EventLoopGroup(sharing: loop))
            for form in [HeaderForm.structured, .extended, .simple] {
                let options = NBDClientOptions(export: "disk", contexts: [MetaContext.allocation], form: form)
                let connection = try await Self.connect(server, loop, options)
                #expect(connection.form == form)
                try await connection.zero(at: 0, count: 1 << 20)
                let ones = Payload(IOBuffer(copying: [UInt8](repeating: 1, count: 5000)), 0..<5000)
                try await connection.write(ones, at: 20_000)
                try await connection.write(ones, at: 200_000)
                for offset in [0, 1, 4095, 12_288] as [UInt64] {
                    for flags in [[], CommandFlags.doNotFragment] as [CommandFlags] where form != .simple || flags == []
                    {
                        let data = Payload(IOBuffer(capacity: 256 << 10), 0..<(256 << 10))
                        try await connection.read(into: data, at: offset, flags: flags)
                        let expected = (0..<(256 << 10)).map { index in
                            let place = Int(offset) + index
                            return (20_000..<25_000).contains(place) || (200_000..<205_000).contains(place)
                                ? 1 : 0 as UInt8
                        }
                        #expect(data.bytes.elementsEqual(expected))
                    }
                }
                await connection.disconnect()
            }
        }
    }

    @Test func extendedHeadersCarryLengthsBeyondFourGiB() async throws {
        try await onLoop { loop in
            let exports = ExportTable()
            exports.add(Export(name: "disk", backEnd: try RawFile(memory: 1 << 40)))
            let server = NBDServer(exports: exports, credentials: nil, loops: EventLoopGroup(sharing: loop))
            let options = NBDClientOptions(
                export: "disk",
                contexts: [MetaContext.allocation, MetaContext.allocationDepth]
            )
            let connection = try await Self.connect(server, loop, options)
            #expect(connection.form == .extended && connection.flags.contains(.blockStatusPayload))
            #expect(try await connection.extents(at: 0, count: 1 << 40) == [Extent(length: 1 << 40, flags: 3)])
            #expect(
                try await connection.extents(of: MetaContext.allocationDepth, at: 0, count: 1 << 40)
                    == [Extent(length: 1 << 40, flags: 1)]
            )
            try await connection.zero(at: 4096, count: (1 << 40) - 4096)
            try await connection.trim(at: 0, count: 1 << 40)
            try await connection.cache(at: 0, count: 1 << 20)
            await connection.disconnect()
        }
    }

    @Test func writesWithoutTheFlagOfTheirPayloadAreDoneAndToldOfOnce() async throws {
        try await onLoop { loop in
            let exports = ExportTable()
            let disk = try RawFile(memory: 1 << 20)
            exports.add(Export(name: "disk", backEnd: disk))
            let notes = Guarded<[String]>([])
            let server = NBDServer(
                exports: exports,
                credentials: nil,
                loops: EventLoopGroup(sharing: loop),
                note: { text in notes.withLock { $0.append(text) } }
            )
            let (near, far) = MemoryChannel.pair(on: loop)
            let serving = Task(executorPreference: loop) { try await server.serve(far) }
            let client = RawClient(channel: near)
            try await client.enterExtended("disk")
            func request(_ command: NBDCommand, _ offset: UInt64, _ length: UInt64) -> [UInt8] {
                let header = IOBuffer(capacity: 32)
                NBDRequest(command, cookie: offset, offset: offset, length: length)
                    .encode(into: header.mutable(0..<32), form: .extended)
                return Array(header.bytes(0..<32))
            }
            for offset in [0, 4096] as [UInt64] {
                try await near.write(request(.write, offset, 512) + [UInt8](repeating: 0xa5, count: 512))
                let reply = try await near.read(exactly: 32)
                // Done, with nothing that follows.
                #expect(reply[4..<8].elementsEqual([0, 1, 0, 0]) && reply[24...].allSatisfy { $0 == 0 })
            }
            let data = Payload(IOBuffer(capacity: 512), 0..<512)
            try await disk.read(into: data, at: 4096)
            #expect(data.bytes.allSatisfy { $0 == 0xa5 })
            try await near.write(request(.disconnect, 0, 0))
            try await serving.value
            #expect(notes.withLock { $0 }.count == 1 && notes.withLock { $0[0].contains("2 writes") })

            // One that claims more than a payload may have is not waited for.
            let (second, other) = MemoryChannel.pair(on: loop)
            let refusing = Task(executorPreference: loop) { try await server.serve(other) }
            let liar = RawClient(channel: second)
            try await liar.enterExtended("disk")
            try await second.write(request(.write, 0, 1 << 40))
            await #expect(throws: ChannelError.self) { try await refusing.value }
        }
    }

    @Test func aClientThatVanishesInAWriteLeavesNothingBehind() async throws {
        try await onLoop { loop in
            let exports = ExportTable()
            exports.add(Export(name: "disk", backEnd: try RawFile(memory: 1 << 20)))
            let server = NBDServer(exports: exports, credentials: nil, loops: EventLoopGroup(sharing: loop))
            let (near, far) = MemoryChannel.pair(on: loop)
            let serving = Task(executorPreference: loop) { try await server.serve(far) }
            let client = RawClient(channel: near)
            try await client.greet()
            #expect(try await client.ask(7, RawClient.name("disk", [0, 0])) == NBDOptionReply.info)
            #expect(try await client.reply().type == NBDOptionReply.ack)
            let header = IOBuffer(capacity: 28)
            NBDRequest(.write, cookie: 1, offset: 0, length: 65536).encode(into: header.mutable(0..<28), form: .simple)
            try await near.write(Array(header.bytes(0..<28)) + [UInt8](repeating: 1, count: 1000))
            near.close()
            await #expect(throws: ChannelError.self) { try await serving.value }
            #expect(exports.all[0].connections == 0 && server.connectionCount == 0)
        }
    }

    @Test func strangersCrowdOutThemselvesAndNotAGoodClient() async throws {
        let directory = try TestDirectory()
        let loops = EventLoopGroup(count: 1, name: "nbd")
        defer { loops.stop() }
        let exports = ExportTable()
        exports.add(Export(name: "disk", backEnd: try RawFile(memory: 1 << 20)))
        let server = NBDServer(exports: exports, credentials: nil, loops: loops)
        let loop = loops.loops[0]
        let listener = try await loop.run {
            try await Listener.listen(on: .unix(path: directory.file("s")), loop: loop, backlog: 4096)
        }
        let serving = Task(executorPreference: loop) { await server.serve(listener) }
        try await onLoop { client in
            var strangers: [SocketChannel] = []
            // As many as descriptors allow, twice over: each one takes two here.
            for _ in 0..<2000 {
                strangers.append(try await SocketChannel.connect(to: listener.address, on: client))
            }
            let connection = try await NBDConnection.connect(
                to: listener.address,
                on: client,
                NBDClientOptions(export: "disk")
            )
            #expect(connection.size == 1 << 20)
            try await eventually("those who gave way have gone") { server.connectionCount <= 200 }
            await connection.disconnect()
            for stranger in strangers { stranger.close() }
        }
        listener.abort()
        await server.drain(grace: .milliseconds(10))
        await serving.value
    }

    @Test func requestsThatNeverEndLetOthersOfTheLoopWork() async throws {
        try await onLoop { loop in
            let exports = ExportTable()
            exports.add(Export(name: "disk", backEnd: try RawFile(memory: 1 << 20)))
            let server = NBDServer(exports: exports, credentials: nil, loops: EventLoopGroup(sharing: loop))
            // All requests are there before the server begins, and all replies fit: it never has to wait for its client.
            let (near, far) = MemoryChannel.pair(on: loop, capacity: 8 << 20)
            let header = IOBuffer(capacity: 28)
            NBDRequest(.read, cookie: 1, offset: 0, length: 16).encode(into: header.mutable(0..<28), form: .simple)
            let request = Array(header.bytes(0..<28))
            try await near.write([0, 0, 0, 3] + RawClient.option(7, RawClient.name("disk", [0, 0])))
            var many: [UInt8] = []
            for _ in 0..<100_000 { many += request }
            try await near.write(many)
            try await near.finishWriting()
            let turns = Guarded(0)
            let serving = Task(executorPreference: loop) { try await server.serve(far) }
            let others = Task(executorPreference: loop) {
                while !Task.isCancelled {
                    turns.withLock { $0 += 1 }
                    await Task.yield()
                }
            }
            try await serving.value
            others.cancel()
            #expect(turns.withLock { $0 } > 100)
        }
    }
}
