import IO
import Synchronization
import TLS
import TestSupport
import Testing

@testable import NBD

/// What one client can hold of a server.
@Suite(.timeLimit(.minutes(1)))
struct ConnectionBoundsTests {
    private func withServer(
        _ limits: NBDServer.Limits,
        _ body: @escaping @Sendable (NBDServer, TestPKI, EventLoop) async throws -> Void
    ) async throws {
        let pki = try TestPKI()
        let credentials = try pki.credentials(.server)
        try await onLoop { loop in
            let exports = ExportTable()
            for name in ["a", "b"] { exports.add(Export(name: name, backEnd: try RawFile(memory: 1 << 20))) }
            let server = NBDServer(
                exports: exports,
                credentials: credentials,
                loops: EventLoopGroup(sharing: loop),
                limits: limits
            )
            try await body(server, pki, loop)
        }
    }

    @Test func whatOnePeersRequestsHoldIsBoundedOverAllItsConnectionsAndOthersDoNotWait() async throws {
        var limits = NBDServer.Limits()
        limits.payloadForPeer = 600 << 10
        try await withServer(limits) { server, pki, loop in
            let disk = ServerBehaviourTests.GatedDisk(loop)
            server.exports.add(Export(name: "gated", backEnd: disk))
            let other = try pki.issue("other", hosts: ["other"])
            // A write that is stuck holds its payload; neither a read nor a write of the same peer comes in beside it.
            var connections: [NBDConnection] = []
            for directory in [pki.directory, pki.directory, pki.directory, other] {
                connections.append(try await self.connect(server, loop, "gated", as: directory))
            }
            let entered = { disk.entered.load(ordering: .sequentiallyConsistent) }
            try await withThrowingTaskGroup(of: Void.self) { group in
                func ask(_ connection: NBDConnection, reads: Bool = false) {
                    group.addTask(executorPreference: loop) {
                        let buffer = IOBuffer(capacity: 512 << 10)
                        let payload = Payload(buffer, 0..<(512 << 10))
                        if reads {
                            try await connection.read(into: payload, at: 0)
                        } else {
                            try await connection.write(payload, at: 0)
                        }
                    }
                }
                ask(connections[0])
                try await eventually("the first is stuck") { entered() == 1 }
                ask(connections[1])
                ask(connections[2], reads: true)
                ask(connections[3])
                try await eventually("the other peer's is not kept") { entered() == 2 }
                await loop.sleep(for: .milliseconds(200))
                #expect(entered() == 2)
                disk.open()
                try await group.waitForAll()
                #expect(entered() == 4)
            }
            for connection in connections { await connection.disconnect() }
        }
    }

    private func connect(_ server: NBDServer, _ loop: EventLoop, _ export: String, as directory: String) async throws
        -> NBDConnection
    {
        let credentials = try X509Credentials(id: "x", directory: directory, endpoint: .client, sanityCheck: false)
        let options = NBDClientOptions(export: export, credentials: credentials, hostname: "localhost")
        return try await ServerBehaviourTests.connect(server, loop, options)
    }

    @Test func moreConnectionsToOneExportAreRefusedAndOtherExportsAreNot() async throws {
        var limits = NBDServer.Limits()
        limits.connectionsToExport = 2
        try await withServer(limits) { server, pki, loop in
            var held: [NBDConnection] = []
            for _ in 0..<2 { held.append(try await self.connect(server, loop, "a", as: pki.directory)) }
            let error = await #expect(throws: (any Error).self) {
                try await self.connect(server, loop, "a", as: pki.directory)
            }
            #expect("\(error.map { "\($0)" } ?? "")".contains("limit of 2 connections to one export"))
            let other = try await self.connect(server, loop, "b", as: pki.directory)
            await held.removeLast().disconnect()
            try await eventually("a place is free") { server.connectionCount == 2 }
            held.append(try await self.connect(server, loop, "a", as: pki.directory))
            for connection in held + [other] { await connection.disconnect() }
        }
    }

    @Test func onePeerCannotTakeThePlacesOfOthers() async throws {
        var limits = NBDServer.Limits()
        limits.connections = 4
        limits.connectionsForPeer = 2
        try await withServer(limits) { server, pki, loop in
            let other = try pki.issue("other", hosts: ["other"])
            var held: [NBDConnection] = []
            for name in ["a", "b"] { held.append(try await self.connect(server, loop, name, as: pki.directory)) }
            let error = await #expect(throws: (any Error).self) {
                try await self.connect(server, loop, "b", as: pki.directory)
            }
            #expect("\(error.map { "\($0)" } ?? "")".contains("limit of 2 connections for one peer"))
            held.append(try await self.connect(server, loop, "a", as: other))
            await held.removeFirst().disconnect()
            try await eventually("a place is free") { server.connectionCount == 2 }
            held.append(try await self.connect(server, loop, "a", as: pki.directory))
            for connection in held { await connection.disconnect() }
        }
    }
}
