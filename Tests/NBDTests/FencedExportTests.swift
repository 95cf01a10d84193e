import IO
import Synchronization
import TestSupport
import Testing

@testable import NBD

/// A client that has lost its connections begins a new life of its export, in which nothing of the old one is left.
@Suite(.timeLimit(.minutes(1)))
struct FencedExportTests {
    func withServer(
        access: ExportAccess = .readWrite,
        _ body:
            @escaping @Sendable (NBDServer, ExportTable, ServerBehaviourTests.GatedDisk, EventLoop) async throws -> Void
    ) async throws {
        let loop = EventLoop(name: "test")
        defer { loop.stop() }
        try await loop.run {
            let disk = ServerBehaviourTests.GatedDisk(loop)
            let exports = ExportTable()
            exports.addFenced(Export(name: "disk", backEnd: disk) { _ in access })
            let server = NBDServer(exports: exports, credentials: nil, loops: EventLoopGroup(sharing: loop))
            try await body(server, exports, disk, loop)
        }
    }

    func connect(_ server: NBDServer, _ loop: EventLoop, _ name: String) async throws -> NBDConnection {
        try await ServerBehaviourTests.connect(server, loop, NBDClientOptions(export: name))
    }

    @Test func nothingOfANewLifeBeginsBeforeEverythingOfTheOldOneHasEnded() async throws {
        try await withServer { server, _, disk, loop in
            let old = try await self.connect(server, loop, "disk#1")
            let other = try await self.connect(server, loop, "disk#1")
            let payload = Payload(IOBuffer(copying: [UInt8](repeating: 7, count: 4096)), 0..<4096)
            let write = Task(executorPreference: loop) { try await old.write(payload, at: 0) }
            while disk.entered.load(ordering: .relaxed) == 0 { await loop.sleep(for: .milliseconds(1)) }
            let hasBegun = Atomic<Bool>(false)
            let next = Task(executorPreference: loop) {
                let connection = try await self.connect(server, loop, "disk#2")
                hasBegun.store(true, ordering: .relaxed)
                return connection
            }
            // The old connections are dropped at once, the write that is under way is not finished by that.
            while old.failure == nil || other.failure == nil { await loop.sleep(for: .milliseconds(1)) }
            await #expect(throws: NBDError.self) { try await write.value }
            let early = hasBegun.load(ordering: .relaxed)
            #expect(!early)
            disk.open()
            let connection = try await next.value
            try await connection.write(payload, at: 0)
            await #expect(throws: ChannelError.self) { try await self.connect(server, loop, "disk#1") }
            let second = try await self.connect(server, loop, "disk#2")
            #expect(second.failure == nil && connection.failure == nil)
        }
    }

    @Test func whoeverMayNotWriteEndsNobodysLife() async throws {
        try await withServer(access: .readOnly) { server, _, _, loop in
            let reader = try await self.connect(server, loop, "disk#0")
            _ = try await self.connect(server, loop, "disk#9")
            #expect(reader.failure == nil)
        }
    }

    @Test func theEndOfAnExportIsTheEndOfAllItsLives() async throws {
        try await withServer { server, exports, disk, loop in
            disk.open()
            let first = try await self.connect(server, loop, "disk#1")
            let second = try await self.connect(server, loop, "disk#2")
            await exports.closeFenced("disk")
            while first.failure == nil || second.failure == nil { await loop.sleep(for: .milliseconds(1)) }
            for name in ["disk", "disk#2", "disk#3"] {
                await #expect(throws: ChannelError.self) { try await self.connect(server, loop, name) }
            }
        }
    }
}
