import Glibc
import IO
import TLS
import TestSupport
import Testing

@testable import NBD

/// A server over an image in a temporary directory, and a client of it, over memory or TLS over memory.
func withExport(
    size: String = "1M",
    tls: Bool = false,
    readOnly: Bool = false,
    _ body: @escaping @Sendable (NBDConnection, Export, String) async throws -> Void
) async throws {
    let directory = try TestDirectory()
    let pki = tls ? try TestPKI() : nil
    let path = directory.file("disk")
    _ = try await Tool.run(["truncate", "-s", size, path])
    let export = Export(name: "disk", backEnd: try RawFile(path: path, readOnly: readOnly))
    let exports = ExportTable()
    exports.add(export)
    let server = try pki?.credentials(.server)
    let client = try pki?.credentials(.client)
    try await onLoop { loop in
        let group = EventLoopGroup(count: 1, name: "nbd")
        defer { group.stop() }
        let (near, far) = MemoryChannel.pair(on: loop)
        let nbd = NBDServer(exports: exports, credentials: server, loops: group)
        let serving = Task(executorPreference: loop) { try? await nbd.serve(far) }
        let options = NBDClientOptions(
            export: "disk",
            credentials: client,
            hostname: "localhost",
            contexts: [MetaContext.allocation]
        )
        let connection = try await NBDConnection.open(over: near, options)
        try await body(connection, export, path)
        await connection.disconnect()
        await serving.value
        withExtendedLifetime(directory) {}
    }
}

func payload(_ byte: UInt8, _ count: Int) -> Payload {
    Payload(IOBuffer(copying: [UInt8](repeating: byte, count: count)), 0..<count)
}

func allocated(_ path: String) -> Int {
    var status = stat()
    return stat(path, &status) == 0 ? Int(status.st_blocks) * 512 : -1
}

@Suite(.timeLimit(.minutes(1)))
struct TransmissionTests {
    @Test(arguments: [false, true])
    func whatWasWrittenIsReadBack(_ tls: Bool) async throws {
        try await withExport(tls: tls) { connection, _, _ in
            #expect(connection.size == 1 << 20)
            try await connection.write(payload(7, 70000), at: 12345)
            try await connection.write(payload(8, 10), at: 500, fua: true)
            let back = payload(0, 70002)
            try await connection.read(into: back, at: 12344)
            #expect(Array(back.bytes) == [0] + [UInt8](repeating: 7, count: 70000) + [0])
            try await connection.flush()
        }
    }

    @Test func zeroesBecomeHolesAndExtentsShowThem() async throws {
        try await withExport { connection, _, path in
            try await connection.write(payload(7, 1 << 20), at: 0)
            try await connection.flush()
            let full = allocated(path)
            try await connection.zero(at: 0, count: 512 << 10)
            try await connection.trim(at: 768 << 10, count: 256 << 10)
            #expect(allocated(path) <= full - (700 << 10))
            let extents = try await connection.extents(at: 0, count: 1 << 20)
            #expect(
                extents == [
                    Extent(length: 512 << 10, isHole: true, isZero: true),
                    Extent(length: 256 << 10, isHole: false, isZero: false),
                    Extent(length: 256 << 10, isHole: true, isZero: true),
                ]
            )
            try await connection.zero(at: 0, count: 512 << 10, mayDeallocate: false)
            #expect(allocated(path) >= 700 << 10)
        }
    }

    @Test func requestsBeyondTheEndAreErrorsAndTheConnectionGoesOn() async throws {
        try await withExport { connection, _, _ in
            let write = await #expect(throws: NBDError.self) {
                try await connection.write(payload(1, 2), at: (1 << 20) - 1)
            }
            #expect(write?.number == .noSpace)
            let read = await #expect(throws: NBDError.self) {
                try await connection.read(into: payload(0, 2), at: UInt64.max)
            }
            #expect(read?.number == .invalid)
            try await connection.read(into: payload(0, 2), at: 0)
        }
    }

    @Test func aReadOnlyExportRefusesEveryChange() async throws {
        try await withExport(readOnly: true) { connection, _, _ in
            #expect(connection.flags.contains(.readOnly))
            for change in [NBDCommand.write, .trim, .writeZeroes] {
                let error = await withUnsafeContinuation { continuation in
                    connection.submit(change, length: 10, data: payload(1, 10)) { continuation.resume(returning: $0) }
                }
                #expect(error?.number == .notPermitted)
            }
            try await connection.read(into: payload(0, 2), at: 0)
        }
    }

    @Test func manyRequestsInFlightAreAllAnswered() async throws {
        try await withExport(size: "16M", tls: true) { connection, _, _ in
            await withTaskGroup(of: Void.self) { group in
                for index in 0..<64 {
                    group.addTask(executorPreference: connection.loop) {
                        let offset = UInt64(index) * 65536
                        try? await connection.write(payload(UInt8(index), 65536), at: offset)
                        let back = payload(0, 65536)
                        try? await connection.read(into: back, at: offset)
                        #expect(back.bytes.allSatisfy { $0 == UInt8(index) })
                    }
                }
            }
        }
    }

    @Test func closingAnExportEndsItsConnectionsAndAdmitsNoNewOnes() async throws {
        try await withExport { connection, export, _ in
            #expect(export.connections == 1)
            await export.close()
            #expect(export.connections == 0)
            await #expect(throws: NBDError.self) { try await connection.read(into: payload(0, 1), at: 0) }
        }
    }

    @Test func theImageLockKeepsQEMUOutAndIsReleased() async throws {
        let directory = try TestDirectory()
        let path = directory.file("disk")
        _ = try await Tool.run(["truncate", "-s", "1M", path])
        let file = try RawFile(path: path, readOnly: false)
        try file.lock()
        let locked = try await Tool.run(["qemu-io", "-f", "raw", "-c", "write 0 512", path])
        #expect(locked.code != 0 && locked.all.contains("lock"))
        #expect(throws: ChannelError.self) { try RawFile(path: path, readOnly: false).lock() }
        file.unlock()
        #expect(try await Tool.run(["qemu-io", "-f", "raw", "-c", "write 0 512", path]).code == 0)
    }
}
