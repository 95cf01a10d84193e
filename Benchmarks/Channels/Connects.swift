import Glibc
import IO
import NBD
import TLS

/// Connect, TLS handshake, GO and disconnect, one after the other, against two servers in turn: ours, in a process of its own that
/// this program is started as, and the one on `peer`.
enum Connects {
    /// Serves an export of 1 MiB until the process is killed; prints the port.
    static func serve(_ credentials: any TLSCredentials, image: String) async throws {
        let loops = EventLoopGroup(name: "nbd")
        let exports = ExportTable()
        exports.add(Export(name: "", summary: "", backEnd: try RawFile(path: image, readOnly: false)))
        let server = NBDServer(exports: exports, credentials: credentials, loops: loops)
        let loop = loops.loops[0]
        try await loop.run {
            let listener = try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
            print(listener.address.port ?? 0)
            fflush(nil)
            await server.serve(listener)
        }
    }

    /// How many connections a second a server takes from one client.
    static func rate(_ credentials: any TLSCredentials, port: UInt16, count: Int) async throws -> Double {
        let loop = EventLoop(name: "client")
        defer { loop.stop() }
        return try await loop.run {
            let options = NBDClientOptions(
                export: "",
                credentials: credentials,
                hostname: "localhost",
            )
            let start = ContinuousClock.now
            for _ in 0..<count {
                let address = SocketAddress.inet(host: "127.0.0.1", port: port)
                let connection = try await NBDConnection.connect(to: address, on: loop, options)
                await connection.disconnect()
            }
            return Double(count) / ((ContinuousClock.now - start) / .seconds(1))
        }
    }
}
