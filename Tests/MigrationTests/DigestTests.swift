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
}
