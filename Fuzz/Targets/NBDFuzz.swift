internal import Glibc
internal import IO
internal import NBD
internal import TestSupport

/// Whole NBD sessions over memory, with one end played by the input. The first byte chooses how far the session has got when
/// the input begins.
enum NBDFuzz {
    private static let loop = EventLoop(name: "fuzz-nbd")
    private static let exports: ExportTable = {
        let table = ExportTable()
        if let disk = try? RawFile(memory: 1 << 20) {
            table.add(Export(name: "disk", summary: "a disk", backEnd: disk))
        }
        table.add(Export(name: "blocks", backEnd: Blocks(size: 1 << 20)))
        return table
    }()
    private static let loops = EventLoopGroup(sharing: loop)

    /// A disk that takes whole blocks only.
    private final class Blocks: BackEnd {
        let size: UInt64
        let isReadOnly = false
        var traits: BackEndTraits {
            var traits = BackEndTraits()
            traits.blockSizes = BlockSizes(minimum: 4096, preferred: 4096, maximum: 1 << 20)
            return traits
        }

        init(size: UInt64) { self.size = size }

        private func check(_ offset: UInt64, _ count: UInt64) {
            precondition(
                offset % 4096 == 0 && count % 4096 == 0 && offset + count <= size,
                "the server let a bad range through"
            )
        }
        func tryRead(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws -> Bool {
            check(offset, UInt64(buffer.count))
            return false
        }
        func read(into payload: Payload, at offset: UInt64) async throws {
            payload.mutable.initializeMemory(as: UInt8.self, repeating: 7)
        }
        func tryWrite(_ payload: Payload, at offset: UInt64, fua: Bool) throws -> Bool {
            check(offset, UInt64(payload.count))
            return false
        }
        func write(_ payload: Payload, at offset: UInt64, fua: Bool) async throws {}
        func zero(at offset: UInt64, count: UInt64, _ options: ZeroOptions) async throws { check(offset, count) }
        func trim(at offset: UInt64, count: UInt64, fua: Bool) async throws { check(offset, count) }
        func flush() async throws {}
        func extents(at offset: UInt64, count: UInt64, limit: Int) async throws -> [Extent] {
            check(offset, count)
            return [Extent(length: count, isHole: false, isZero: false)]
        }
    }

    private static func big<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
        withUnsafeBytes(of: value.bigEndian) { Array($0) }
    }
    private static func option(_ number: UInt32, _ payload: [UInt8] = []) -> [UInt8] {
        big(UInt64(0x4948_4156_454f_5054)) + big(number) + big(UInt32(payload.count)) + payload
    }
    private static func text(_ value: String) -> [UInt8] { big(UInt32(value.utf8.count)) + Array(value.utf8) }

    private static let flags = big(UInt32(3))
    private static let go = option(7, text("disk") + big(UInt16(0)))
    private static let goBlocks = option(7, text("blocks") + big(UInt16(1)) + big(UInt16(3)))
    private static let contexts = option(
        10,
        text("disk") + big(UInt32(2)) + text("base:allocation") + text("qemu:allocation-depth")
    )
    /// What a client has said before the input begins.
    private static let clientPrefixes: [[UInt8]] = [
        [], flags, flags + option(8), flags + option(11), flags + go, flags + option(8) + contexts + go,
        flags + option(11) + contexts + go, flags + option(8) + goBlocks,
    ]

    /// A client's side of a session.
    static func server(_ input: UnsafeRawBufferPointer) {
        guard let first = input.first else { return }
        let bytes = clientPrefixes[Int(first) % clientPrefixes.count] + Array(input.dropFirst())
        let done = Gate()
        Task(executorPreference: loop) {
            let (near, far) = MemoryChannel.pair(on: loop, capacity: bytes.count + (64 << 10))
            try? await near.write(bytes)
            try? await near.finishWriting()
            let draining = Task(executorPreference: loop) {
                let buffer = IOBuffer(capacity: 64 << 10)
                while let count = try? await near.readSome(into: buffer.mutable(0..<(64 << 10))), count > 0 {}
            }
            try? await NBDServer(exports: exports, credentials: nil, loops: loops).serve(far)
            await draining.value
            near.close()
            done.open()
        }
        done.wait()
    }

    private static func answer(_ option: UInt32, _ type: UInt32, _ payload: [UInt8] = []) -> [UInt8] {
        big(UInt64(0x0003_e889_0455_65a9)) + big(option) + big(type) + big(UInt32(payload.count)) + payload
    }

    private static let greeting =
        big(UInt64(0x4e42_444d_4147_4943)) + big(UInt64(0x4948_4156_454f_5054)) + big(UInt16(3))
    private static let refused: UInt32 = 1 << 31 | 1
    private static let context = answer(10, 4, big(UInt32(9)) + Array("base:allocation".utf8)) + answer(10, 1)
    private static let ready =
        answer(7, 3, big(UInt16(0)) + big(UInt64(1 << 20)) + big(UInt16(0xffff & ~2))) + answer(7, 1)
    /// What a server has said before the input begins.
    private static let serverPrefixes: [[UInt8]] = [
        [], greeting, greeting + answer(11, refused) + answer(8, refused), greeting + answer(11, 1),
        greeting + answer(11, refused) + answer(8, refused) + ready,
        greeting + answer(11, refused) + answer(8, 1) + context + ready, greeting + answer(11, 1) + context + ready,
    ]

    /// A server's side of a session.
    static func client(_ input: UnsafeRawBufferPointer) {
        guard let first = input.first else { return }
        let bytes = serverPrefixes[Int(first) % serverPrefixes.count] + Array(input.dropFirst())
        let asks = first & 0x80 != 0
        let done = Gate()
        Task(executorPreference: loop) {
            let (near, far) = MemoryChannel.pair(on: loop, capacity: bytes.count + (64 << 10))
            try? await far.write(bytes)
            try? await far.finishWriting()
            let draining = Task(executorPreference: loop) {
                let buffer = IOBuffer(capacity: 64 << 10)
                while let count = try? await far.readSome(into: buffer.mutable(0..<(64 << 10))), count > 0 {}
            }
            let options = NBDClientOptions(export: "disk", contexts: ["base:allocation"])
            if asks {
                if let negotiation = try? await NBDNegotiation.start(over: near, options) {
                    _ = try? await negotiation.list()
                    _ = try? await negotiation.info("disk")
                    _ = try? await negotiation.listContexts("disk")
                    await negotiation.abort()
                }
            } else if let connection = try? await NBDConnection.open(over: near, options) {
                await use(connection)
            }
            near.close()
            far.close()
            await draining.value
            done.open()
        }
        done.wait()
    }

    /// Asks for everything at once, so that the input's replies, with the cookies 1 to 5, have something to answer.
    private static func use(_ connection: NBDConnection) async {
        await withTaskGroup(of: Void.self) { group in
            group.addTask(executorPreference: loop) {
                let data = Payload(IOBuffer(capacity: 4096), 0..<4096)
                try? await connection.read(into: data, at: 512)
            }
            group.addTask(executorPreference: loop) {
                let found = try? await connection.extents(at: 0, count: 65536)
                precondition((found ?? []).reduce(0) { $0 + $1.length } <= 65536, "extents beyond the request")
            }
            group.addTask(executorPreference: loop) { try? await connection.flush() }
            group.addTask(executorPreference: loop) {
                try? await connection.write(Payload(IOBuffer(copying: [1, 2, 3]), 0..<3), at: 9)
            }
            group.addTask(executorPreference: loop) { try? await connection.zero(at: 0, count: 4096) }
        }
        await connection.disconnect()
    }

    /// A URI.
    static func uri(_ input: UnsafeRawBufferPointer) {
        guard let uri = try? NBDURI(parsing: String(decoding: input, as: UTF8.self)) else { return }
        precondition(uri.export.utf8.count <= 4096, "a name that is too long")
    }
}
