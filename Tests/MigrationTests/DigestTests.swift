import Glibc
import IO
import Migration
import NBD
import TLS
import TestSupport
import Testing

struct DigestTests {
    /// The definition, spelled out.
    func reference(_ bytes: [UInt8]) -> String {
        var all: [UInt8] = []
        for start in stride(from: 0, to: bytes.count, by: 65536) {
            all += HashAlgorithm.sha256.hash(bytes[start..<min(start + 65536, bytes.count)])
        }
        return HashAlgorithm.sha256.hash(all).hex
    }

    @Test(arguments: [0, 1, 65535, 65536, 65537, 300_000])
    func theDigestOfAFileIsTheDefinitions(_ size: Int) throws {
        let directory = try TestDirectory()
        var bytes = (0..<size).map { UInt8(truncatingIfNeeded: $0 &* 31 >> 3) }
        if size > 200_000 { for index in 65536..<140_000 { bytes[index] = 0 } }
        try DurableFile.write(bytes, to: directory.file("f"))
        #expect(try ChunkDigests.digest(of: directory.file("f")) == reference(bytes))
    }

    @Test func holesCountAsZeroesWithoutBeingRead() throws {
        let directory = try TestDirectory()
        let path = directory.file("f")
        try DurableFile.write([], to: path)
        #expect(truncate(path, 10_000_001) == 0)
        let digests = try ChunkDigests(size: 10_000_001, isBlank: false)
        #expect(try digests.update(from: path) == 0)
        #expect(digests.digest() == reference([UInt8](repeating: 0, count: 10_000_001)))
    }

    @Test func onlyWhatChangedIsReadAgain() async throws {
        let directory = try TestDirectory()
        let path = directory.file("f")
        try DurableFile.write([], to: path)
        #expect(truncate(path, 1 << 20) == 0)
        let digests = try ChunkDigests(size: 1 << 20, isBlank: true)
        #expect(try digests.update(from: path) == 0)
        let file = try RawFile(path: path, readOnly: false, observer: digests)
        let payload = Payload(IOBuffer(copying: [UInt8](repeating: 5, count: 70000)), 0..<70000)
        try await file.write(payload, at: 65000, fua: false)
        #expect(try digests.update(from: path) == 3)
        #expect(try digests.update(from: path) == 0)
        #expect(digests.digest() == reference(try DurableFile.read(path) ?? []))
        try await file.zero(at: 0, count: 1 << 20, [.mayDeallocate])
        try digests.update(from: path)
        #expect(digests.digest() == reference([UInt8](repeating: 0, count: 1 << 20)))
    }

    @Test func whatChangesAllTheTimeIsLeftForLater() async throws {
        let directory = try TestDirectory()
        let path = directory.file("f")
        try DurableFile.write([], to: path)
        #expect(truncate(path, 16 << 20) == 0)
        let digests = try ChunkDigests(size: 16 << 20, isBlank: true)
        let file = try RawFile(path: path, readOnly: false, observer: digests)
        func write(_ chunk: UInt64) async throws {
            try await file.write(
                Payload(IOBuffer(copying: [UInt8](repeating: 7, count: 65536)), 0..<65536),
                at: chunk << 16,
                fua: false
            )
        }
        func settled() throws -> Int { try digests.update(from: path, in: .init(.settled)) }
        for chunk in [0, 5, 64, 255] { try await write(UInt64(chunk)) }
        #expect(try settled() == 0)
        try await write(5)
        #expect(try settled() == 3)
        #expect(digests.isStale)
        #expect(try settled() == 1)
        #expect(!digests.isStale)
        // What a look for the settled has seen, and not read, is not forgotten by a full pass.
        try await write(9)
        #expect(try settled() == 0)
        #expect(try digests.update(from: path) == 1)
        #expect(digests.digest() == reference(try DurableFile.read(path) ?? []))
    }

    @Test func workersShareOnePass() async throws {
        let directory = try TestDirectory()
        let path = directory.file("f")
        let bytes = (0..<(40 << 20)).map { UInt8(truncatingIfNeeded: $0 &* 31 >> 3) }
        try DurableFile.write(bytes, to: path)
        let digests = try ChunkDigests(size: 40 << 20, isBlank: false)
        let pass = ChunkDigests.Pass()
        let read = try await withThrowingTaskGroup(of: Int.self) { group in
            for _ in 0..<4 {
                group.addTask { try await BlockingPool.shared.run { try digests.update(from: path, in: pass) } }
            }
            return try await group.reduce(0, +)
        }
        #expect(read == 640)
        #expect(!digests.isStale)
        #expect(digests.digest() == reference(bytes))
    }

    @Test func aPassThatIsStoppedLeavesTheRestMarked() throws {
        let directory = try TestDirectory()
        let path = directory.file("f")
        let bytes = (0..<(40 << 20)).map { UInt8(truncatingIfNeeded: $0 &* 31 >> 3) }
        try DurableFile.write(bytes, to: path)
        let digests = try ChunkDigests(size: 40 << 20, isBlank: false)
        var looks = 0
        let first = try digests.update(from: path) {
            looks += 1
            return looks > 5
        }
        #expect(first > 0 && first < 640 && digests.isStale)
        #expect(try digests.update(from: path) == 640 - first)
        #expect(digests.digest() == reference(bytes))
    }
}
