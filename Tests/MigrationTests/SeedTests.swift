import IO
import TLS
import TestSupport
import Testing

@testable import Migration

/// The table of what the destination has, and what it takes out of a mirror, in memory.
@Suite(.timeLimit(.minutes(2)))
struct SeedTests {
    static let chunk = 65536

    /// Digests of 16 bytes that differ, or are zeroes.
    private func digests(_ values: [UInt8]) -> [UInt8] {
        values.flatMap { value in [UInt8](repeating: value, count: 16) }
    }

    private func encode(_ values: [UInt8]) -> [UInt8] { digests(values).withUnsafeBytes { DigestRuns.encode($0) } }

    private func bytes(_ value: UInt8, chunks: Int = 1) -> [UInt8] {
        (0..<(chunks * Self.chunk)).map { UInt8(truncatingIfNeeded: $0 >> 8) &+ value }
    }

    private func digest(_ bytes: [UInt8]) -> [UInt8] { Array(HashAlgorithm.sha256.hash(bytes).prefix(16)) }

    // MARK: The table on the wire

    @Test(
        arguments: [
            [], [1], [0, 0, 0], [1, 2, 3], [0, 0, 1, 2, 0, 0, 0, 3, 3, 4], [5, 5, 1, 5, 5], [1, 1, 2, 2, 3],
        ] as [[UInt8]]
    )
    func aTableIsReadAsItWasWritten(_ values: [UInt8]) throws {
        let encoded = encode(values)
        let runs = try #require(DigestRuns.decode(encoded, most: values.count))
        var read: [UInt8] = []
        for run in runs {
            for index in 0..<run.count {
                let offset = run.offset + (run.isRepeated ? 0 : index * 16)
                read += encoded[offset..<(offset + 16)]
            }
        }
        #expect(read == digests(values))
    }

    @Test func zeroesTakeNoRoomAndDigestsLittleMoreThanThemselves() {
        #expect(encode([UInt8](repeating: 0, count: 4096)).count == 20)
        let random = (0..<(1024 * 16)).map { _ in UInt8.random(in: 0...255) }
        let encoded = random.withUnsafeBytes { DigestRuns.encode($0) }
        #expect(Double(encoded.count) <= 0.0003 * 1024 * Double(Self.chunk))
    }

    @Test func aTableThatLiesAboutItsSizeIsNone() {
        let repeated: [UInt8] = [0xff, 0xff, 0xff, 0xff] + digests([0])
        #expect(DigestRuns.decode(repeated, most: 1 << 20) == nil)
        #expect(DigestRuns.decode([0, 0, 0, 2] + digests([1]), most: 8) == nil)
        #expect(DigestRuns.decode([0, 0, 0, 0], most: 8) == nil)
        #expect(DigestRuns.decode([0x80, 0, 0], most: 8) == nil)
        #expect(DigestRuns.decode(encode([1, 2, 3]), most: 2) == nil)
        var table = SeedTable(chunks: 3)
        #expect(throws: ChannelError.self) { try table.append([]) }
        #expect(throws: ChannelError.self) { try table.append(encode([1, 2, 3, 4])) }
        #expect(table.end == 0)
    }

    @Test func aTableIsKeptWithinBounds() throws {
        let chunks = 1 << 20
        var table = SeedTable(chunks: chunks)
        var next = 0
        while !table.isComplete {
            if !table.hasRoom {
                let known = table.end
                table.release(before: known - 1000)
                #expect(table.hasRoom && table.withDigest(of: known - 1, { $0[0] }) == UInt8((known - 1) % 251))
            }
            try table.append(encode((next..<(next + 1024)).map { UInt8($0 % 251) }))
            next += 1024
        }
        #expect(table.withDigest(of: 0, { $0[0] }) == nil)
        #expect(table.withDigest(of: chunks - 1, { $0[0] }) == UInt8((chunks - 1) % 251))
        #expect(table.withDigest(of: chunks, { $0[0] }) == nil)
    }

    // MARK: What is sent

    /// A filter that knows these chunks, and the loop that it is confined to.
    private func withFilter(
        size: Int,
        _ chunks: [[UInt8]],
        _ body: @escaping @Sendable (SeedFilter) async throws -> Void
    ) async throws {
        let loop = EventLoop(name: "test")
        defer { loop.stop() }
        let table = chunks.flatMap { $0.allSatisfy { $0 == 0 } ? [UInt8](repeating: 0, count: 16) : digest($0) }
        try await loop.run {
            let (near, far) = MemoryChannel.pair(on: loop)
            let filter = SeedFilter(size: UInt64(size))
            let following = Task(executorPreference: loop) { await filter.follow(MessageConnection(near)) }
            try await MessageConnection(far).send(data: table.withUnsafeBytes { DigestRuns.encode($0) })
            await filter.reach(0..<UInt64(size))
            #expect(await following.value == nil)
            try await body(filter)
        }
    }

    private func split(_ filter: SeedFilter, _ bytes: [UInt8], at offset: Int) -> [SeedFilter.Part] {
        bytes.withUnsafeBytes { filter.split($0, at: UInt64(offset)) }
    }

    private func part(_ range: Range<Int>, _ isThere: Bool) -> SeedFilter.Part {
        .init(range: UInt64(range.lowerBound)..<UInt64(range.upperBound), isThere: isThere)
    }

    @Test func whatIsTheSameIsNotSentAndWhatDiffersIs() async throws {
        let (one, two, three) = (bytes(1), bytes(2), bytes(3))
        let zero = [UInt8](repeating: 0, count: Self.chunk)
        try await withFilter(size: 4 * Self.chunk, [one, two, zero, three]) { filter in
            let parts = self.split(filter, one + self.bytes(9) + zero + three, at: 0)
            #expect(
                parts == [
                    self.part(0..<Self.chunk, true), self.part(Self.chunk..<(2 * Self.chunk), false),
                    self.part((2 * Self.chunk)..<(4 * Self.chunk), true),
                ]
            )
            // What was sent differs from the table now, even if the guest writes back what was there.
            #expect(self.split(filter, two, at: Self.chunk).map(\.isThere) == [false])
            // What was not sent is there still.
            #expect(self.split(filter, three, at: 3 * Self.chunk).map(\.isThere) == [true])
        }
    }

    @Test func aPartOfAChunkIsSentAndItsRestIsNotTakenForThere() async throws {
        let (one, two) = (bytes(1), bytes(2))
        try await withFilter(size: 2 * Self.chunk, [one, two]) { filter in
            // The end of the first chunk, and all of the second.
            let parts = self.split(filter, Array(one[65000...]) + two, at: 65000)
            #expect(
                parts == [self.part(65000..<Self.chunk, false), self.part(Self.chunk..<(2 * Self.chunk), true)]
            )
            #expect(self.split(filter, one, at: 0).map(\.isThere) == [false])
        }
    }

    @Test func theShortLastChunkCounts() async throws {
        let (one, last) = (bytes(1), Array(bytes(2)[..<1000]))
        try await withFilter(size: Self.chunk + 1000, [one, last]) { filter in
            #expect(self.split(filter, one + last, at: 0) == [self.part(0..<(Self.chunk + 1000), true)])
        }
    }

    @Test func zeroesAreSentWhereThereAreNone() async throws {
        let zero = [UInt8](repeating: 0, count: Self.chunk)
        try await withFilter(size: 3 * Self.chunk, [zero, bytes(1), zero]) { filter in
            #expect(filter.splitZeroes(0..<UInt64(3 * Self.chunk)).map(\.isThere) == [true, false, true])
            // Zeroes are there now, but the table does not say so.
            #expect(filter.splitZeroes(0..<UInt64(3 * Self.chunk)).map(\.isThere) == [true, false, true])
        }
    }

    @Test func aTableThatBreaksOffHoldsNobodyUp() async throws {
        let loop = EventLoop(name: "test")
        defer { loop.stop() }
        let one = bytes(1)
        try await loop.run {
            let (near, far) = MemoryChannel.pair(on: loop)
            let filter = SeedFilter(size: UInt64(4 * Self.chunk))
            let following = Task(executorPreference: loop) { await filter.follow(MessageConnection(near)) }
            let known = self.digest(one).withUnsafeBytes { DigestRuns.encode($0) }
            try await MessageConnection(far).send(data: known)
            await filter.reach(0..<UInt64(Self.chunk))
            #expect(!filter.isReached(0..<UInt64(2 * Self.chunk)))
            // It goes on as a table of more chunks than there are.
            try await MessageConnection(far).send(data: [0x80, 0, 1, 0] + [UInt8](repeating: 0, count: 16))
            await filter.reach(0..<UInt64(4 * Self.chunk))
            #expect(await following.value?.contains("longer than the disk") == true)
            #expect(self.split(filter, one + one, at: 0).map(\.isThere) == [true, false])
        }
    }

    // MARK: Lineages

    @Test func aProofIsGoodForOneSideOneDiskAndOneSession() async throws {
        let pki = try TestPKI()
        let loop = EventLoop(name: "test")
        defer { loop.stop() }
        let (client, server) = (try pki.credentials(.client), try pki.credentials(.server))
        try await loop.run {
            func sessions() async throws -> (TLSSession, TLSSession) {
                let (a, b) = MemoryChannel.pair(on: loop)
                let accepting = Task(executorPreference: loop) {
                    try await TLSChannel.handshake(over: b, credentials: server)
                }
                let near = try await TLSChannel.handshake(over: a, credentials: client, hostname: "localhost")
                return (near.session, try await accepting.value.session)
            }
            let (near, far) = try await sessions()
            let (other, _) = try await sessions()
            let (mine, theirs) = (SeedExchange.makeNonce(), SeedExchange.makeNonce())
            let here = try SeedExchange(near, source: mine, destination: theirs)
            let there = try SeedExchange(far, source: mine, destination: theirs)
            let lineage = Lineage()
            let proof = try here.proof(of: lineage, by: .source, for: "disk0")
            #expect(there.isProof(proof, of: lineage, by: .source, for: "disk0"))
            #expect(!there.isProof(proof, of: lineage, by: .destination, for: "disk0"))
            #expect(!there.isProof(proof, of: lineage, by: .source, for: "disk1"))
            #expect(!there.isProof(proof, of: Lineage(), by: .source, for: "disk0"))
            #expect(!there.isProof("", of: lineage, by: .source, for: "disk0"))
            let elsewhere = try SeedExchange(other, source: mine, destination: theirs)
            #expect(!elsewhere.isProof(proof, of: lineage, by: .source, for: "disk0"))
            let later = try SeedExchange(far, source: mine, destination: SeedExchange.makeNonce())
            #expect(!later.isProof(proof, of: lineage, by: .source, for: "disk0"))
            #expect(throws: ChannelError.self) { try SeedExchange(far, source: "00", destination: theirs) }
            #expect("\(lineage)" == "a lineage" && Lineage(lineage.text) == lineage && Lineage("00") == nil)
        }
    }

    // MARK: Reading once more

    @Test func whatChangedBehindTheDigestsIsFoundByAComparison() async throws {
        let directory = try TestDirectory()
        let path = directory.file("f")
        try DurableFile.write(bytes(1, chunks: 100) + [UInt8](repeating: 0, count: 28 * Self.chunk), to: path)
        let digests = try ChunkDigests(size: UInt64(128 * Self.chunk), isBlank: false)
        try digests.update(from: path, in: .init(words: 0..<1))
        #expect(digests.isStale)
        try digests.update(from: path, in: .init(words: 1..<2))
        #expect(!digests.isStale)
        try digests.update(from: path, in: .init(.comparison))
        #expect(!digests.isStale)
        // A bit of data, and one where there was none.
        let patched = try await Tool.run([
            "sh", "-c",
            "for at in 70000 7500000; do printf x | dd of=\(path) bs=1 seek=$at conv=notrunc status=none; done",
        ])
        #expect(patched.code == 0)
        try digests.update(from: path, in: .init(.comparison))
        #expect(digests.isStale)
        #expect(try digests.update(from: path) == 2)
        #expect(digests.digest() == (try ChunkDigests.digest(of: path)))
    }
}
