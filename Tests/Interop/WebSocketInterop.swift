import Glibc
import IO
import TLS
import TestSupport
import Testing

/// Our websockets against Python's websockets package, in both roles, plain and over TLS.
@Suite(.timeLimit(.minutes(6)))
struct WebSocketInterop {
    /// Debian's interpreter, which has Debian's websockets package.
    static let python = "/usr/bin/python3"

    let pki: TestPKI

    init() throws { pki = try TestPKI() }

    /// Speaks to our echo server: fragments, empty messages, pings between, a large message, an orderly close.
    static let client = """
        import asyncio, ssl, sys, websockets
        async def main(port, ca):
            context = None
            if ca:
                context = ssl.create_default_context(cafile=ca + "/ca-cert.pem")
                context.load_cert_chain(ca + "/client-cert.pem", ca + "/client-key.pem")
            uri = ("wss" if ca else "ws") + f"://localhost:{port}/"
            async with websockets.connect(uri, ssl=context, subprotocols=["chat", "binary"], compression=None, max_size=None) as ws:
                assert ws.subprotocol == "binary", ws.subprotocol
                async def pieces():
                    for n in range(5): yield bytes([n]) * 1000
                await ws.send(pieces())
                await (await ws.ping(b"in between"))
                await ws.send(b"")
                big = bytes(i % 251 for i in range(3_000_000))
                await ws.send(big)
                expected = b"".join(bytes([n]) * 1000 for n in range(5)) + big
                got = b""
                while len(got) < len(expected):
                    message = await ws.recv()
                    assert isinstance(message, bytes)
                    got += message
                assert got == expected
            assert ws.close_code == 1000, ws.close_code
            print("all is well")
        asyncio.run(main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None))
        """

    @Test(arguments: [false, true])
    func pythonsClientWithOurServer(_ overTLS: Bool) async throws {
        let loop = EventLoop(name: "server")
        defer { loop.stop() }
        let credentials = try pki.credentials(.server)
        let listener = try await loop.run {
            try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
        }
        let script =
            [Self.python, "-c", Self.client, "\(listener.address.port ?? 0)"] + (overTLS ? [pki.directory] : [])
        let child = try ChildProcess(script)
        let serving = Task(executorPreference: loop) {
            var base: any Channel = try await listener.accept()
            if overTLS { base = try await TLSChannel.handshake(over: base, credentials: credentials) }
            let channel = try await WebSocketChannel.accept(over: base)
            let buffer = IOBuffer(capacity: 100_000)
            while true {
                let count = try await channel.readSome(into: buffer.mutable(0..<buffer.capacity))
                if count == 0 { break }
                try await channel.writeAll(buffer.bytes(0..<count))
            }
            #expect(channel.peerCloseCode == 1000)
            try await channel.finishWriting()
            channel.close()
        }
        let result = try await child.finish(seconds: 60)
        #expect(result.output.contains("all is well"), "\(result.all)")
        try await serving.value
        listener.abort()
    }

    static let server = """
        import asyncio, ssl, sys, websockets
        async def echo(ws, path=None):
            assert ws.subprotocol == "binary", ws.subprotocol
            await (await ws.ping(b"hello"))
            async for message in ws:
                await ws.send([message[:len(message) // 2], message[len(message) // 2:]])
        async def main(ca):
            context = None
            if ca:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(ca + "/server-cert.pem", ca + "/server-key.pem")
            async with websockets.serve(echo, "127.0.0.1", 0, ssl=context, subprotocols=["binary"], max_size=None) as server:
                print("port", server.sockets[0].getsockname()[1], flush=True)
                await asyncio.Future()
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else None))
        """

    @Test(arguments: [false, true])
    func pythonsServerWithOurClient(_ overTLS: Bool) async throws {
        let child = try ChildProcess([Self.python, "-c", Self.server] + (overTLS ? [pki.directory] : []))
        try await child.wait(for: "a websocket server") { child.output.hasSuffix("\n") }
        let port = try #require(UInt16(child.output.dropLast().dropFirst(5)))
        let credentials = try pki.credentials(.client)
        let loop = EventLoop(name: "client")
        defer { loop.stop() }
        try await loop.run {
            var base: any Channel = try await SocketChannel.connect(to: .inet(host: "127.0.0.1", port: port), on: loop)
            if overTLS {
                base = try await TLSChannel.handshake(over: base, credentials: credentials, hostname: "localhost")
            }
            let channel = try await WebSocketChannel.connect(over: base, host: "localhost:\(port)")
            let bytes = (0..<1_000_000).map { UInt8(truncatingIfNeeded: $0 % 251) }
            async let sent: Void = channel.write(bytes)
            #expect(try await channel.read(exactly: bytes.count) == bytes)
            try await sent
            try await channel.ping(Array("still there".utf8))
            try await channel.finishWriting()
            let buffer = IOBuffer(capacity: 1)
            #expect(try await channel.readSome(into: buffer.mutable(0..<1)) == 0)
            #expect(channel.peerCloseCode == 1000)
            channel.close()
        }
    }

    @Test func aPlainHTTPClientIsToldWhatIsWrong() async throws {
        let loop = EventLoop(name: "server")
        defer { loop.stop() }
        let listener = try await loop.run {
            try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
        }
        let child = try ChildProcess([
            Self.python, "-c",
            """
            import sys, urllib.request, urllib.error
            try: urllib.request.urlopen("http://127.0.0.1:" + sys.argv[1])
            except urllib.error.HTTPError as error: print(error.code, error.read().decode())
            """, "\(listener.address.port ?? 0)",
        ])
        try await loop.run {
            let base = try await listener.accept()
            await #expect(throws: ChannelError.self) { try await WebSocketChannel.accept(over: base) }
        }
        let result = try await child.finish()
        #expect(result.output.hasPrefix("426 it does not ask for an upgrade to websocket"), "\(result.all)")
    }
}
