import Glibc
import IO
import Testing

struct ListenerTests {
    /// What is said about a connection has to say whose it was.
    @Test func whoHasGoneBeforeTheAcceptIsNamedAllTheSame() async throws {
        let loop = EventLoop(name: "test")
        defer { loop.stop() }
        let (own, named) = try await loop.run {
            let listener = try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
            defer { listener.close() }
            let client = try await SocketChannel.connect(to: listener.address, on: loop)
            let own = try #require(client.localAddress).description
            // The end is a reset.
            var linger = linger(l_onoff: 1, l_linger: 0)
            setsockopt(client.descriptor, SOL_SOCKET, SO_LINGER, &linger, socklen_t(MemoryLayout<Glibc.linger>.size))
            client.close()
            let accepted = try await listener.accept()
            defer { accepted.close() }
            return (own, accepted.peerName)
        }
        #expect(named == own)
    }
}
