import IO
import TestSupport
import Testing

@testable import NBD

/// Writes whose payload is compressed: an agreement between two agents, beside the specification.
@Suite(.timeLimit(.minutes(1)))
struct CompressedWriteTests {
    private static func packed(_ bytes: [UInt8], size: UInt32? = nil) throws -> [UInt8] {
        var frame = [UInt8](repeating: 0, count: bytes.count + 1024)
        let compressor = try #require(ZstdCompressor(level: 1))
        let made = bytes.withUnsafeBytes { source in
            frame.withUnsafeMutableBytes { compressor.compress(source, into: $0) }
        }
        let count = try #require(made)
        return withUnsafeBytes(of: (size ?? UInt32(bytes.count)).bigEndian, Array.init) + frame.prefix(count)
    }

    /// A server in memory, and a connection to its export.
    private func withServer(
        takesCompressed: Bool,
        _ body: @escaping @Sendable (NBDConnection, RawFile) async throws -> Void
    ) async throws {
        try await onLoop { loop in
            let disk = try RawFile(memory: 4 << 20)
            let exports = ExportTable()
            exports.add(Export(name: "disk", backEnd: disk, takesCompressed: takesCompressed))
            let server = NBDServer(exports: exports, credentials: nil, loops: EventLoopGroup(sharing: loop))
            let (near, far) = MemoryChannel.pair(on: loop)
            let serving = Task(executorPreference: loop) { try? await server.serve(far) }
            let connection = try await NBDConnection.open(over: near, NBDClientOptions(export: "disk"))
            try await body(connection, disk)
            connection.abort(ChannelError(.closed, "The test is over"))
            await serving.value
        }
    }

    private func write(
        _ connection: NBDConnection,
        _ bytes: [UInt8],
        at offset: UInt64,
        length: Int
    ) async -> NBDError? {
        await withUnsafeContinuation { continuation in
            connection.submitCompressed(
                Payload(IOBuffer(copying: bytes), 0..<bytes.count),
                offset: offset,
                length: UInt64(length)
            ) { continuation.resume(returning: $0) }
        }
    }

    @Test func dataArrivesAsItWasBeforeItWasCompressed() async throws {
        try await withServer(takesCompressed: true) { connection, _ in
            for (offset, count) in [(0, 1 << 20), (1 << 20, 5000), (3 << 20, 1 << 20), (12345, 1)] {
                let data = (0..<count).map { UInt8(truncatingIfNeeded: ($0 >> 6) + offset) }
                #expect(await write(connection, try Self.packed(data), at: UInt64(offset), length: count) == nil)
                let read = payload(0, count)
                try await connection.read(into: read, at: UInt64(offset))
                #expect(Array(read.bytes) == data)
            }
            #expect(connection.bytesInFlight == 0)
        }
    }

    @Test func aPayloadThatIsLongerThanWhatItBecomesEndsTheConnection() async throws {
        try await withServer(takesCompressed: true) { connection, _ in
            let data = [UInt8](repeating: 7, count: 4096)
            // A frame that decompressors skip, in front.
            let skipped: [UInt8] = [0x50, 0x2a, 0x4d, 0x18, 0x00, 0x20, 0, 0] + [UInt8](repeating: 0, count: 0x2000)
            var packed = try Self.packed(data)
            packed.insert(contentsOf: skipped, at: 4)
            #expect(await write(connection, packed, at: 0, length: 4096) != nil)
            #expect(connection.failure != nil)
        }
    }

    @Test func aRangeThatIsNotThereIsRefusedAndTheConnectionGoesOn() async throws {
        try await withServer(takesCompressed: true) { connection, _ in
            let data = [UInt8](repeating: 7, count: 8192)
            let beyond = await write(connection, try Self.packed(data), at: (4 << 20) - 4096, length: 8192)
            #expect(beyond?.number == .noSpace)
            #expect(await write(connection, try Self.packed(data), at: 0, length: 8192) == nil)
        }
    }

    @Test func whoDoesNotTakeThemSaysSo() async throws {
        try await withServer(takesCompressed: false) { connection, _ in
            let data = [UInt8](repeating: 7, count: 8192)
            #expect(await write(connection, try Self.packed(data), at: 0, length: 8192)?.number == .invalid)
            let read = payload(1, 8192)
            try await connection.read(into: read, at: 0)
            #expect(read.bytes.allSatisfy { $0 == 0 })
        }
    }

    @Test func whatIsNotWhatItSaysEndsTheConnectionAndChangesNothing() async throws {
        let data = [UInt8](repeating: 7, count: 8192)
        let whole = try Self.packed(data)
        for bytes in [
            try Self.packed(data, size: 8191), try Self.packed(data, size: 8193), Array(whole.dropLast(3)),
            try Self.packed([UInt8](repeating: 0, count: 1 << 22), size: 8192), Array(whole.prefix(4)) + [1, 2, 3],
            Array(whole.prefix(4)),
        ] {
            try await withServer(takesCompressed: true) { connection, disk in
                #expect(await write(connection, bytes, at: 0, length: 8192)?.number == .io)
                #expect(connection.failure != nil)
                let read = payload(1, 8192)
                try await disk.read(into: read, at: 0)
                #expect(read.bytes.allSatisfy { $0 == 0 })
            }
        }
    }
}
