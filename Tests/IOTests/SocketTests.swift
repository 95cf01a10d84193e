import Glibc
import IO
import TestSupport
import Testing

@Suite(.timeLimit(.minutes(1)))
struct SocketTests {
    @Test(arguments: [
        ("host-b", SocketAddress.inet(host: "host-b", port: 7)),
        ("host-b:99", .inet(host: "host-b", port: 99)),
        ("[::1]:99", .inet(host: "::1", port: 99)),
        ("::1", .inet(host: "::1", port: 7)),
        (":99", .inet(host: "", port: 99)),
        ("unix:/run/x", .unix(path: "/run/x")),
    ])
    func addressesAreReadAsTheyAreWritten(_ text: String, _ expected: SocketAddress) throws {
        #expect(try SocketAddress(parsing: text, defaultPort: 7) == expected)
    }

    @Test(arguments: ["host:", "host:port", "host:65536", "[::1", "[::1]99"])
    func addressesThatMakeNoSenseAreErrors(_ text: String) {
        #expect(throws: ChannelError.self) { try SocketAddress(parsing: text, defaultPort: 7) }
    }

    @Test func connectingToAPortWithoutListenerNamesTheAddress() async throws {
        try await onLoop { loop in
            let listener = try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
            let address = listener.address
            listener.close()
            let error = await #expect(throws: ChannelError.self) {
                try await SocketChannel.connect(to: address, on: loop)
            }
            #expect(error?.number == ECONNREFUSED)
            #expect(error?.message.contains("\(address)") == true)
        }
    }

    @Test func aConnectThatIsNotAnsweredEndsAtItsTimeout() async throws {
        try await onLoop { loop in
            // A full backlog leaves further connection requests without any answer.
            let listener = try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop, backlog: 0)
            var error: ChannelError?
            var admitted: [SocketChannel] = []
            for _ in 0..<8 where error == nil {
                do {
                    admitted.append(
                        try await SocketChannel.connect(to: listener.address, on: loop, timeout: .milliseconds(200))
                    )
                } catch let failure as ChannelError { error = failure }
            }
            #expect(error?.code == .timedOut)
            #expect(error?.message.contains("\(listener.address)") == true)
            listener.close()
        }
    }

    @Test func anUnknownHostIsNamed() async throws {
        try await onLoop { loop in
            let error = await #expect(throws: ChannelError.self) {
                try await SocketChannel.connect(to: .inet(host: "no-such-host.invalid", port: 1), on: loop)
            }
            #expect(error?.code == .unresolved)
            #expect(error?.message.contains("no-such-host.invalid") == true)
        }
    }

    @Test func aStaleSocketFileIsReplacedAndALiveOneIsNot() async throws {
        try await onLoop { loop in
            let directory = try TestDirectory()
            let address = SocketAddress.unix(path: directory.file("s"))
            let listener = try await Listener.listen(on: address, loop: loop)
            await #expect(throws: ChannelError.self) { try await Listener.listen(on: address, loop: loop) }
            listener.close()
            let stale = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
            var raw = sockaddr_un()
            raw.sun_family = sa_family_t(AF_UNIX)
            let path = Array(directory.file("s").utf8)
            withUnsafeMutableBytes(of: &raw.sun_path) { $0.copyBytes(from: path) }
            let bound = withUnsafePointer(to: &raw) { pointer in
                pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                    bind(stale, $0, socklen_t(MemoryLayout<sockaddr_un>.size))
                }
            }
            #expect(bound == 0)
            close(stale)
            try await Listener.listen(on: address, loop: loop).close()
        }
    }

    @Test func theListenersSocketFileIsForItsOwnerOnly() async throws {
        try await onLoop { loop in
            let directory = try TestDirectory()
            let listener = try await Listener.listen(on: .unix(path: directory.file("s")), loop: loop)
            var status = stat()
            #expect(stat(directory.file("s"), &status) == 0)
            #expect(status.st_mode & 0o777 == 0o600)
            listener.close()
            #expect(access(directory.file("s"), F_OK) != 0)
        }
    }

    @Test func thePeerOfAUnixSocketIsKnownByItsProcess() async throws {
        try await onLoop { loop in
            let (a, b) = try SocketChannel.pair(on: loop)
            #expect(a.peerCredentials?.process == getpid())
            #expect(a.peerCredentials?.user == getuid())
            a.close()
            b.close()
        }
    }
}
