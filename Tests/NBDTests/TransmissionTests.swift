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
    /// What real clients do that the specification does not want of them.
    @Test func aTrimOfPartsOfBlocksIsOneOfTheWholeBlocksInIt() {
        let terms = NBDRequest.Terms(
            size: 10_000,
            flags: [.hasFlags, .sendTrim],
            blockSizes: BlockSizes(minimum: 4096, preferred: 4096, maximum: 32 << 20),
            form: .extended,
            hasContexts: false
        )
        for (asked, done) in [
            ((0, 4096), (0, 4096)), ((1, 8191), (4096, 4096)), ((0, 4097), (0, 4096)), ((1, 4095), (4096, 0)),
            ((100, 100), (0, 0)), ((4096, 5904), (4096, 5904)), ((5000, 5000), (8192, 1808)),
            ((9000, 1000), (10_000, 0)),
        ] as [((UInt64, UInt64), (UInt64, UInt64))] {
            let whole = NBDRequest(.trim, cookie: 1, offset: asked.0, length: asked.1).roundedInwards(terms)
            #expect(whole.length == done.1 && (done.1 == 0 || whole.offset == done.0), "\(asked): \(whole)")
            #expect(whole.fault(terms) == nil)
        }
        for (offset, length) in [(1, 10_000), (UInt64.max - 1, 4), (10_001, 0)] as [(UInt64, UInt64)] {
            let beyond = NBDRequest(.trim, cookie: 1, offset: offset, length: length)
            #expect(beyond.roundedInwards(terms).offset == offset && beyond.roundedInwards(terms).fault(terms) != nil)
        }
    }

    @Test func aMaximumThatIsPassedOnDoesNotShutOutClientsThatSendMore() async throws {
        try await onLoop { loop in
            let exports = ExportTable()
            let disk = try RawFile(memory: 4 << 20)
            exports.add(Export(name: "disk", backEnd: SmallPayloads(disk)))
            let server = NBDServer(exports: exports, credentials: nil, loops: EventLoopGroup(sharing: loop))
            for form in [HeaderForm.simple, .extended] {
                let (near, far) = MemoryChannel.pair(on: loop)
                let serving = Task(executorPreference: loop) { try await server.serve(far) }
                let client = RawClient(channel: near)
                try await client.greet()
                if form == .extended { #expect(try await client.ask(11, []) == NBDOptionReply.ack) }
                // With a request for the block sizes, which are told.
                #expect(try await client.ask(7, RawClient.name("disk", [0, 1, 0, 3])) == NBDOptionReply.info)
                while try await client.reply().type == NBDOptionReply.info {}
                let header = IOBuffer(capacity: 32)
                let size = form.requestSize
                NBDRequest(.write, cookie: 9, offset: 0, length: 1 << 20)
                    .encode(into: header.mutable(0..<size), form: form)
                try await near.write(Array(header.bytes(0..<size)) + [UInt8](repeating: 3, count: 1 << 20))
                let reply = try await near.read(exactly: form == .extended ? 32 : 16)
                // A chunk without an error, or a simple reply with the error 0.
                #expect(form == .extended ? reply[6..<8].elementsEqual([0, 0]) : reply[4..<8].allSatisfy { $0 == 0 })
                near.close()
                _ = try? await serving.value
            }
        }
    }

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
        #expect(throws: FileError.self) { try RawFile(path: path, readOnly: false).lock() }
        file.unlock()
        #expect(try await Tool.run(["qemu-io", "-f", "raw", "-c", "write 0 512", path]).code == 0)
    }
}

/// An image whose server was told a small maximum by another one, and passes it on.
private final class SmallPayloads: BackEnd {
    let disk: RawFile
    init(_ disk: RawFile) { self.disk = disk }

    var size: UInt64 { disk.size }
    var isReadOnly: Bool { false }
    var traits: BackEndTraits {
        var traits = disk.traits
        traits.blockSizes.maximum = 65536
        return traits
    }
    func tryRead(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws -> Bool {
        try disk.tryRead(into: buffer, at: offset)
    }
    func read(into payload: Payload, at offset: UInt64) async throws { try await disk.read(into: payload, at: offset) }
    func tryWrite(_ payload: Payload, at offset: UInt64, fua: Bool) throws -> Bool {
        try disk.tryWrite(payload, at: offset, fua: fua)
    }
    func write(_ payload: Payload, at offset: UInt64, fua: Bool) async throws {
        try await disk.write(payload, at: offset, fua: fua)
    }
    func zero(at offset: UInt64, count: UInt64, _ options: ZeroOptions) async throws {
        try await disk.zero(at: offset, count: count, options)
    }
    func trim(at offset: UInt64, count: UInt64, fua: Bool) async throws {
        try await disk.trim(at: offset, count: count, fua: fua)
    }
    func flush() async throws { try await disk.flush() }
    func extents(at offset: UInt64, count: UInt64, limit: Int) async throws -> [Extent] {
        try await disk.extents(at: offset, count: count, limit: limit)
    }
}
