import Glibc
import IO
import NBD
import TLS
import TestSupport
import Testing

/// Our client against the servers that people use.
@Suite(.timeLimit(.minutes(9)))
struct ClientInterop {

    func exercise(_ server: ChildProcess, port: UInt16, pki: TestPKI, export: String) async throws {
        defer { server.signal(SIGTERM) }
        let loop = EventLoop(name: "client")
        defer { loop.stop() }
        let credentials = try pki.credentials(.client)
        try await loop.run {
            let options = NBDClientOptions(
                export: export,
                credentials: credentials,
                hostname: "localhost",
                contexts: [MetaContext.allocation]
            )
            let address = SocketAddress.inet(host: "localhost", port: port)
            let connection = try await NBDConnection.connect(to: address, on: loop, options)
            #expect(connection.size == 4 << 20)
            #expect(connection.tls?.version == "1.3")
            let data = IOBuffer(copying: (0..<300_000).map { UInt8(truncatingIfNeeded: $0 * 7) })
            try await connection.write(Payload(data, 0..<300_000), at: 4096)
            try await connection.zero(at: 8192, count: 4096)
            try await connection.flush()
            let back = IOBuffer(capacity: 300_000)
            try await connection.read(into: Payload(back, 0..<300_000), at: 4096)
            #expect(back.bytes(0..<4096).elementsEqual(data.bytes(0..<4096)))
            #expect(back.bytes(4096..<8192).allSatisfy { $0 == 0 })
            #expect(back.bytes(8192..<300_000).elementsEqual(data.bytes(8192..<300_000)))
            let extents = try await connection.extents(at: 0, count: 4 << 20)
            #expect(extents.reduce(0) { $0 + $1.length } > 0)
            await #expect(throws: NBDError.self) { try await connection.read(into: Payload(back, 0..<10), at: 4 << 20) }
            await connection.disconnect()
        }
    }

    @Test func qemuNBDOverTLS() async throws {
        let pki = try TestPKI()
        let directory = try TestDirectory()
        let image = directory.file("disk")
        _ = try await Tool.run(["truncate", "-s", "4M", image])
        let (server, port) = try await startServer { port in
            [
                "qemu-nbd", "-b", "localhost", "-p", "\(port)", "-f", "raw", "-e", "16", "-t", "-x", "disk",
                "--object", "tls-creds-x509,id=tls0,dir=\(pki.directory),endpoint=server,verify-peer=yes",
                "--tls-creds", "tls0", image,
            ]
        }
        try await exercise(server, port: port, pki: pki, export: "disk")
    }

    @Test func nbdkitOverTLS() async throws {
        let pki = try TestPKI()
        let (server, port) = try await startServer { port in
            [
                "nbdkit", "-f", "-p", "\(port)", "-i", "localhost", "--tls=require",
                "--tls-certificates=\(pki.directory)", "--tls-verify-peer", "memory", "4M",
            ]
        }
        try await exercise(server, port: port, pki: pki, export: "")
    }

    @Test func aServerWithoutTLSIsNeverUsedInClearText() async throws {
        let pki = try TestPKI()
        let (server, port) = try await startServer { port in
            ["nbdkit", "-f", "-p", "\(port)", "-i", "localhost", "memory", "4M"]
        }
        let error = await #expect(throws: ChannelError.self) {
            try await exercise(server, port: port, pki: pki, export: "")
        }
        #expect(error?.code == .protocolViolation, "\(error!)")
    }

    @Test func aMapIsWholeWhereTheServerCountsWith32Bits() async throws {
        let directory = try TestDirectory()
        let socket = directory.file("s")
        // One page of data within 20 GiB, behind what one request can ask about.
        let server = try ChildProcess([
            "nbdkit", "-f", "-U", socket, "data", "@\(9 << 30) 1 2 3", "size=\(20 << 30)",
        ])
        try await server.wait(for: "nbdkit") { isListening(socket) }
        let loops = EventLoopGroup(count: 1, name: "client")
        let export = try await ClientBackEnd.open(.unix(path: socket), NBDClientOptions(export: ""), loops: loops)
        #expect(export.form == .structured)
        let all = try await export.extents(at: 0, count: export.size, limit: 8)
        #expect(all.map(\.isZero) == [true, false, true] && all[0].length == 9 << 30, "\(all)")
        #expect(all.reduce(0) { $0 + $1.length } == export.size)
        // As many as are wanted, and the last of them whole.
        let first = try await export.extents(at: 0, count: export.size, limit: 1)
        #expect(first == [all[0]])
        let short = try await export.extents(at: 4096, count: 1 << 20, limit: 8)
        #expect(short.map(\.length) == [1 << 20])
        await export.close()
    }
}
