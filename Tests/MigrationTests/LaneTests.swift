import Glibc
import IO
import Synchronization
import TLS
import TestSupport
import Testing

@testable import Migration

/// A stream over several connections, from socket to socket.
struct LaneTests {
    /// Two connected channels, each on a loop of its own, over TLS or not.
    private func line(_ pki: TestPKI?, _ near: EventLoop, _ far: EventLoop) async throws -> (any Channel, any Channel) {
        let listener = try await far.run { try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: far) }
        let address = listener.address
        async let accepted = far.run { () -> any Channel in
            let socket = try await listener.accept()
            guard let pki else { return socket }
            let credentials = try X509Credentials(id: "s", directory: pki.directory, endpoint: .server)
            return try await TLSChannel.handshake(over: socket, credentials: credentials)
        }
        let client = try await near.run { () -> any Channel in
            let socket = try await SocketChannel.connect(to: address, on: near)
            guard let pki else { return socket }
            let credentials = try X509Credentials(id: "c", directory: pki.directory, endpoint: .client)
            return try await TLSChannel.handshake(over: socket, credentials: credentials, hostname: "127.0.0.1")
        }
        let server = try await accepted
        listener.abort()
        return (client, server)
    }

    /// What a QEMU would have sent: bytes that tell where they are.
    private static let bytes = (0..<total).map { UInt8(truncatingIfNeeded: $0 &* 2_654_435_761 >> 13) }

    /// Bytes that shrink, with some between them that do not.
    private static let shrinking = (0..<total).map {
        $0 >> 20 & 3 == 3 ? bytes[$0] : UInt8(truncatingIfNeeded: $0 >> 9)
    }

    @Test(
        arguments: [(1, Compression.off), (2, .off), (5, .off), (1, .level(1)), (3, .level(5)), (2, .auto)],
        [false, true]
    )
    func aStreamArrivesAsItWasSentAndTheAnswerComesBack(
        _ kind: (Int, Compression),
        isAcknowledged: Bool
    ) async throws {
        let (count, compression) = kind
        let onLine = Atomic<Int>(0)
        try await carry(over: count, compression, isAcknowledged: isAcknowledged) {
            onLine.wrappingAdd($1, ordering: .relaxed)
        }
        let line = onLine.load(ordering: .relaxed)
        switch compression {
        case .off: #expect(line == Self.total)
        case .level: #expect(line < Self.total / 2, "\(line)")
        // A line without length is faster than any compressor.
        case .auto: #expect(line <= Self.total)
        }
    }

    @Test func aSlowLineIsSeenByWhatArrivesWhateverTheBuffersTake() async throws {
        let onLine = Atomic<Int>(0)
        try await carry(over: 4, .auto, rest: .milliseconds(5)) { onLine.wrappingAdd($1, ordering: .relaxed) }
        // The first 4 MiB were under way before anything was known, and a quarter of all does not shrink.
        let line = onLine.load(ordering: .relaxed)
        #expect(line < Self.total - (2 << 20), "\(line)")
    }

    private static let total = 9 << 20

    private func carry(
        over count: Int,
        _ compression: Compression,
        isAcknowledged: Bool = true,
        rest: Duration? = nil,
        _ told: @escaping @Sendable (Int, Int) -> Void
    ) async throws {
        let bytes = compression == .off ? Self.bytes : Self.shrinking
        let pki = try TestPKI()
        let (source, target) = (EventLoopGroup(count: 3, name: "source"), EventLoopGroup(count: 3, name: "target"))
        defer {
            source.stop()
            target.stop()
        }
        let (near, far) = (source.loops[0], target.loops[0])
        // What stands for QEMU at either end.
        let (sender, sent) = try await near.run { try SocketChannel.pair(on: near) }
        let (received, receiver) = try await far.run { try SocketChannel.pair(on: far) }
        let stream = LaneReceiver(to: received, attempt: 3, acknowledges: isAcknowledged)
        var lanes: [any Channel] = []
        var arriving: [any Channel] = []
        for index in 0..<count {
            let (here, there) = try await line(
                pki,
                index == 0 ? near : source.loops[index % 3],
                index == 0 ? far : target.loops[(index + 1) % 3]
            )
            lanes.append(here)
            arriving.append(there)
            try await stream.join()
        }
        let total = Self.total
        let (outgoing, incoming) = (lanes, arriving)
        try await withThrowingTaskGroup(of: Void.self) { group in
            for (index, lane) in incoming.enumerated() {
                group.addTask(executorPreference: lane.loop) {
                    defer { lane.close() }
                    try await stream.carry(lane, number: index)
                }
            }
            group.addTask(executorPreference: near) {
                try await LaneSender(
                    from: sent,
                    over: outgoing,
                    compression: compression,
                    isAcknowledged: isAcknowledged,
                    count: told
                ).run()
            }
            group.addTask(executorPreference: near) {
                var position = 0
                var size = 1
                while position < total {
                    let next = min(position + size, total)
                    try await sender.write(Array(bytes[position..<next]))
                    position = next
                    size = (size * 7 + 3) % 600_000
                }
                try await sender.finishWriting()
                let answer = try await sender.read(exactly: 7)
                #expect(String(decoding: answer, as: UTF8.self) == "verdict")
                #expect(try await sender.readSome(into: IOBuffer(capacity: 1).mutable(0..<1)) == 0)
                sender.close()
            }
            group.addTask(executorPreference: far) {
                let buffer = IOBuffer(capacity: 1 << 16)
                var position = 0
                while true {
                    let count = try await receiver.readSome(into: buffer.mutable(0..<(1 << 16)))
                    if count == 0 { break }
                    if let rest { await far.sleep(for: rest) }
                    let isRight = Array(buffer.bytes(0..<count)) == Array(bytes[position..<position + count])
                    #expect(isRight, "at \(position)")
                    guard isRight else { break }
                    position += count
                }
                #expect(position == total)
                try await receiver.write(Array("verdict".utf8))
                try await receiver.finishWriting()
                receiver.close()
            }
            try await group.waitForAll()
        }
    }

    /// What a peer with a connection of its own can do to a stream.
    private func attack(
        _ lanes: Int,
        isAcknowledged: Bool = false,
        _ body: @escaping @Sendable ([any Channel]) async throws -> Void
    ) async throws -> [String] {
        let loop = EventLoop(name: "lanes")
        defer { loop.stop() }
        return try await loop.run {
            let (received, receiver) = try SocketChannel.pair(on: loop)
            let stream = LaneReceiver(to: received, attempt: 0, acknowledges: isAcknowledged)
            var (here, there): ([any Channel], [any Channel]) = ([], [])
            for _ in 0..<lanes {
                let (a, b) = try SocketChannel.pair(on: loop)
                here.append(a)
                there.append(b)
                try await stream.join()
            }
            let (attacking, attacked) = (here, there)
            async let drained: Void = {
                let buffer = IOBuffer(capacity: 1 << 16)
                while let count = try? await receiver.readSome(into: buffer.mutable(0..<(1 << 16))), count > 0 {
                    // One that hears of acknowledgements is done with the first piece.
                    if isAcknowledged { break }
                }
                try? await receiver.finishWriting()
            }()
            let reasons = try await withThrowingTaskGroup(of: String.self) { group in
                for (index, lane) in attacked.enumerated() {
                    group.addTask(executorPreference: loop) {
                        defer { lane.close() }
                        do { try await stream.carry(lane, number: index) } catch { return "\(error)" }
                        return ""
                    }
                }
                try await body(attacking)
                return try await group.reduce(into: []) { $0.append($1) }
            }
            await drained
            for channel in attacking { channel.close() }
            receiver.close()
            return reasons
        }
    }

    @Test func whoEndsAfterQEMUHasSaidItsLastBreaksNothing() async throws {
        let reasons = try await attack(3, isAcknowledged: true) { lanes in
            try await lanes[0].write(Self.piece(0, 100) + Self.piece(1, 0))
            try await lanes[0].finishWriting()
            // QEMU has what it needs, and closes.
            #expect(try await lanes[0].readSome(into: IOBuffer(capacity: 1).mutable(0..<1)) == 0)
            for lane in [2, 1] {
                try await lanes[lane].write(Self.piece(1, 0))
                try await lanes[lane].finishWriting()
            }
            let told = try await lanes[1].read(exactly: StreamPiece.acknowledgementSize)
            #expect(told.last == 1)
            #expect(try await lanes[1].readSome(into: IOBuffer(capacity: 1).mutable(0..<1)) == 0)
        }
        #expect(reasons == ["", "", ""])
    }

    private static func piece(_ number: UInt64, _ count: Int, _ bytes: Int? = nil) -> [UInt8] {
        var header = [UInt8](repeating: 0, count: StreamPiece.headerSize)
        header.withUnsafeMutableBytes { StreamPiece(number: number, count: count).write(into: $0) }
        return header + [UInt8](repeating: 1, count: bytes ?? count)
    }

    /// A compressed piece that says that it had a size.
    private static func compressed(_ number: UInt64, size: UInt32, _ content: [UInt8]) -> [UInt8] {
        var header = [UInt8](repeating: 0, count: StreamPiece.headerSize)
        header.withUnsafeMutableBytes {
            StreamPiece(number: number, count: content.count + Packer.prefix, isCompressed: true).write(into: $0)
        }
        return header + withUnsafeBytes(of: size.bigEndian, Array.init) + content
    }

    private static func zstd(_ bytes: [UInt8]) throws -> [UInt8] {
        var result = [UInt8](repeating: 0, count: bytes.count + 1024)
        let compressor = try #require(ZstdCompressor(level: 3))
        let made = bytes.withUnsafeBytes { source in
            result.withUnsafeMutableBytes { compressor.compress(source, into: $0) }
        }
        let count = try #require(made)
        return Array(result.prefix(count))
    }

    @Test func aCompressedPieceThatIsNotWhatItSaysEndsTheStream() async throws {
        let small = try Self.zstd([UInt8](repeating: 7, count: 5000))
        let cases: [(String, [UInt8])] = [
            ("is not what its 5000 bytes become", Self.compressed(0, size: 5000, [UInt8](repeating: 9, count: 100))),
            ("is not what its 4999 bytes become", Self.compressed(0, size: 4999, small)),
            ("is not what its 5001 bytes become", Self.compressed(0, size: 5001, small)),
            ("is not what its 5000 bytes become", Self.compressed(0, size: 5000, Array(small.dropLast(2)))),
            (
                "is not what its 262144 bytes become",
                Self.compressed(0, size: 262_144, try Self.zstd([UInt8](repeating: 0, count: 1 << 24)))
            ),
            ("would have 0 bytes", Self.compressed(0, size: 0, small)),
            ("would have 262145 bytes", Self.compressed(0, size: 262_145, small)),
            ("would have 4294967295 bytes", Self.compressed(0, size: .max, small)),
            ("has 4 bytes", Self.compressed(0, size: 10, [])),
        ]
        for (words, piece) in cases {
            let reasons = try await attack(1) { lanes in try? await lanes[0].write(piece) }
            #expect(reasons.count == 1 && reasons[0].contains(words), "\(words): \(reasons)")
        }
    }

    @Test func aLyingPeerEndsItsStreamOnAllConnections() async throws {
        // Which connection is read first is not said.
        let cases: [(words: [String], first: [[UInt8]], second: [[UInt8]])] = [
            (["twice"], [Self.piece(0, 10), Self.piece(0, 10)], []),
            (["missing"], [Self.piece(1, 10)], [Self.piece(2, 10)]),
            (["missing"], [Self.piece(1, 10)], [Self.piece(.max, 10)]),
            (["more than"], [Self.piece(0, StreamPiece.largest + 1, 0)], []),
            (["before pieces", "beyond its end"], [Self.piece(0, 10), Self.piece(1, 10)], [Self.piece(1, 0)]),
            (["goes on after its end"], [Self.piece(0, 0), Self.piece(0, 10)], []),
            (["in the middle"], [Self.piece(0, 10, 4)], []),
        ]
        for (words, first, second) in cases {
            let reasons = try await attack(2) { lanes in
                for piece in first { try? await lanes[0].write(piece) }
                for piece in second { try? await lanes[1].write(piece) }
                if words == ["in the middle"] { lanes[0].close() }
            }
            let isTold = reasons.contains { reason in words.contains { reason.contains($0) } }
            #expect(reasons.count == 2 && isTold, "\(words): \(reasons)")
            #expect(reasons.allSatisfy { !$0.isEmpty }, "\(words): \(reasons)")
        }
    }

    @Test func aConnectionThatEndsWithoutItsEndBreaksTheOthers() async throws {
        let reasons = try await attack(3) { lanes in
            try await lanes[0].write(Self.piece(1, 10))
            try await lanes[1].finishWriting()
        }
        #expect(reasons.allSatisfy { !$0.isEmpty } && reasons.contains { $0.contains("without its end") }, "\(reasons)")
    }

    /// What becomes of a stream whose other end takes nothing but says so much; the pieces that it was sent.
    private func deceive(
        _ body: @escaping @Sendable ([any Channel]) async throws -> Void
    ) async throws -> (error: String, bytes: Int) {
        let loop = EventLoop(name: "lanes")
        defer { loop.stop() }
        return try await loop.run {
            let (sender, sent) = try SocketChannel.pair(on: loop)
            var (here, there): ([any Channel], [any Channel]) = ([], [])
            for _ in 0..<2 {
                let (a, b) = try SocketChannel.pair(on: loop)
                here.append(a)
                there.append(b)
            }
            let (lanes, others) = (here, there)
            async let feeding: Void = {
                try? await sender.write([UInt8](repeating: 1, count: 32 << 20))
                try? await sender.finishWriting()
            }()
            async let running: String = {
                do {
                    try await LaneSender(from: sent, over: lanes, isAcknowledged: true) { _, _ in }.run()
                } catch { return "\(error)" }
                return ""
            }()
            let drains = others.map { other in
                Task(executorPreference: loop) {
                    let buffer = IOBuffer(capacity: 1 << 16)
                    var taken = 0
                    while let count = try? await other.readSome(into: buffer.mutable(0..<(1 << 16))), count > 0 {
                        taken += count
                    }
                    return taken
                }
            }
            try await body(others)
            let error = await running
            await feeding
            var taken = 0
            for drain in drains { taken += await drain.value }
            for other in others { other.close() }
            sender.close()
            return (error, taken)
        }
    }

    private static func acknowledgement(_ number: UInt64) -> [UInt8] {
        withUnsafeBytes(of: number.bigEndian, Array.init)
    }

    @Test(arguments: [UInt64.max, 1 << 32, 1 << 62])
    func piecesThatWereNotSentCannotHaveArrived(_ number: UInt64) async throws {
        let (error, bytes) = try await deceive { try await $0[1].write(Self.acknowledgement(number)) }
        #expect(error.contains("of the migration stream were passed on, after 0 of"), "\(error)")
        #expect(bytes < PieceWindow.least + StreamPiece.headerSize * 1000)
    }

    @Test func whoSaysNothingMoreEndsTheStream() async throws {
        let (error, _) = try await deceive { try await $0[1].finishWriting() }
        #expect(error.contains("does not say any more"), "\(error)")
    }
}
