import IO
import NBD
import TLS
import TestSupport
import Testing

/// The judge of servers, on our own.
@Suite(.timeLimit(.minutes(2)))
struct ServerConformanceTests {
    struct Served: Sendable {
        let target: ConformanceTarget
        let server: NBDServer
    }

    static func with(
        _ backEnd: any BackEnd,
        credentials: (TestPKI) throws -> ((any TLSCredentials)?, (any TLSCredentials)?),
        mode: TLSMode? = nil,
        limits: NBDServer.Limits = .init(),
        _ body: @escaping @Sendable (EventLoop, Served) async throws -> Void
    ) async throws {
        let pki = try TestPKI()
        let (ours, theirs) = try credentials(pki)
        let directory = try TestDirectory()
        let loops = EventLoopGroup(count: 2, name: "nbd")
        defer { loops.stop() }
        let exports = ExportTable()
        exports.add(Export(name: "disk", summary: "a disk", backEnd: backEnd))
        let server = NBDServer(exports: exports, credentials: ours, mode: mode, loops: loops, limits: limits)
        let loop = loops.loops[0]
        let listener = try await loop.run {
            try await Listener.listen(on: .unix(path: directory.file("s")), loop: loop)
        }
        let serving = Task(executorPreference: loop) { await server.serve(listener) }
        let target = ConformanceTarget(
            address: listener.address,
            export: "disk",
            credentials: theirs,
            hostname: "localhost",
            mayWrite: true
        )
        let client = loops.loops[1]
        let outcome = await Task {
            try await client.run { try await body(client, Served(target: target, server: server)) }
        }.result
        listener.abort()
        await server.drain(grace: .milliseconds(100))
        await serving.value
        withExtendedLifetime(directory) {}
        try outcome.get()
    }

    static func judge(_ loop: EventLoop, _ served: Served) async throws {
        var passed = 0
        try await Conformance.run(against: served.target, on: loop) { verdict in
            #expect(verdict.outcome != .fail, "\(verdict.conformanceCase.name): \(verdict.detail)")
            if verdict.outcome == .pass { passed += 1 }
        }
        #expect(passed > 40)
    }

    @Test func ourServerPassesInClearText() async throws {
        try await Self.with(RawFile(memory: 4 << 20), credentials: { _ in (nil, nil) }, Self.judge)
    }

    @Test(arguments: [TLSMode.required, .perExport])
    func ourServerPassesOverTLS(_ mode: TLSMode) async throws {
        try await Self.with(
            RawFile(memory: 4 << 20),
            credentials: { (try $0.credentials(.server), try $0.credentials(.client)) },
            mode: mode,
            Self.judge
        )
    }

    @Test func ourServerPassesWithAReadOnlyExport() async throws {
        try await Self.with(RawFile(memory: 4 << 20, readOnly: true), credentials: { _ in (nil, nil) }, Self.judge)
    }

    @Test func ourServerPassesInFrontOfAnother() async throws {
        // A disk behind another of our servers, so that every request takes the slow way.
        try await Self.with(RawFile(memory: 4 << 20), credentials: { _ in (nil, nil) }) { _, inner in
            let loops = EventLoopGroup(count: 2, name: "proxy")
            defer { loops.stop() }
            let remote = try await ClientBackEnd.open(
                inner.target.address,
                NBDClientOptions(export: "disk", contexts: [MetaContext.allocationDepth]),
                connections: 2,
                loops: loops
            )
            #expect(remote.form == .extended && remote.connectionCount == 2)
            #expect(remote.traits.contexts == [MetaContext.allocation, MetaContext.allocationDepth])
            try await Self.with(remote, credentials: { _ in (nil, nil) }, Self.judge)
            await remote.close()
        }
    }

    @Test func aClientThatIsSilentIsDroppedAtTheDeadline() async throws {
        var limits = NBDServer.Limits()
        limits.handshake = .milliseconds(100)
        try await Self.with(RawFile(memory: 1 << 20), credentials: { _ in (nil, nil) }, limits: limits) {
            loop,
            served in
            var target = served.target
            target.isPatient = true
            var seen = false
            try await Conformance.run(against: target, where: { $0 == "T-9.deadline" }, on: loop) { verdict in
                seen = true
                #expect(verdict.outcome == .pass, "\(verdict.detail)")
            }
            #expect(seen)
        }
    }

    @Test func theJudgeFindsWhatIsWrong() async throws {
        // A server that says goodbye to everybody fails nearly everything.
        try await onLoop { loop in
            let listener = try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
            let serving = Task(executorPreference: loop) {
                while let channel = try? await listener.accept() { channel.close() }
            }
            let target = ConformanceTarget(address: listener.address, export: "disk", mayWrite: true)
            var failed = 0
            try await Conformance.run(against: target, on: loop) { if $0.outcome == .fail { failed += 1 } }
            #expect(failed > 40)
            listener.close()
            await serving.value
        }
    }
}
