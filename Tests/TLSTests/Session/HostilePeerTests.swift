import Glibc
import IO
import TLS
import TestSupport
import Testing

@Suite(.timeLimit(.minutes(1)))
struct HostilePeerTests {
    let pki: TestPKI

    init() throws { pki = try TestPKI() }

    /// What a TLS server makes of these bytes and an end after them.
    func serve(_ bytes: [UInt8]) async throws -> ChannelError? {
        let credentials = try pki.credentials(.server)
        let loop = EventLoop(name: "test")
        defer { loop.stop() }
        return try await loop.run {
            let (a, b) = MemoryChannel.pair(on: loop, capacity: bytes.count + 65536)
            try await a.write(bytes)
            try await a.finishWriting()
            do {
                _ = try await TLSChannel.handshake(over: b, credentials: credentials)
                return nil
            } catch { return error as? ChannelError }
        }
    }

    @Test(
        arguments: [
            [], [0x16], [0x16, 0x03, 0x01, 0xff, 0xff], [0x16, 0x03, 0x01, 0x00, 0x00],
            [0x16, 0x03, 0x01, 0x40, 0x01, 0x01],
            [0x17, 0x03, 0x03, 0x00, 0x05, 1, 2, 3, 4, 5], [0x15, 0x03, 0x03, 0x00, 0x02, 0x02, 0x28],
            [0x16, 0x03, 0x01, 0x00, 0x04, 0x01, 0xff, 0xff, 0xff], [0x80, 0x2e, 0x01, 0x03, 0x01],
            Array("NBDMAGICIHAVEOPT".utf8), Array("\r\n\r\n".utf8), [UInt8](repeating: 0, count: 20000),
            [UInt8](repeating: 0xff, count: 20000),
        ] as [[UInt8]]
    )
    func garbageInPlaceOfAHandshakeIsAnErrorThatNamesThePeer(_ bytes: [UInt8]) async throws {
        let error = try await serve(bytes)
        #expect(error?.message.contains("memory:a") == true, "\(error.map { "\($0)" } ?? "it was accepted")")
    }

    @Test func aHandshakeThatTricklesIsDroppedAtTheDeadlineOfTheWhole() async throws {
        let credentials = try pki.credentials(.server)
        try await onLoop { loop in
            let (a, b) = MemoryChannel.pair(on: loop)
            let trickling = Task(executorPreference: loop) {
                for byte in [0x16, 0x03, 0x01, 0x02, 0x00] + [UInt8](repeating: 1, count: 507) {
                    try await a.write([byte])
                    await loop.sleep(for: .milliseconds(5))
                }
            }
            let error = await #expect(throws: ChannelError.self) {
                try await TLSChannel.handshake(over: b, credentials: credentials, timeout: .milliseconds(100))
            }
            #expect(error?.code == .timedOut)
            trickling.cancel()
            a.close()
        }
    }
}
