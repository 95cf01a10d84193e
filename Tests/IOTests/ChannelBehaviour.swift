import Glibc
import IO
import TLS
import TestSupport
import Testing

/// A kind of channel, by how a connected pair of it is made.
struct ChannelKind: Sendable, CustomTestStringConvertible {
    let testDescription: String
    let pair: @Sendable (EventLoop) async throws -> (any Channel, any Channel)

    static let pki = Result { try TestPKI() }

    static let memory = ChannelKind(testDescription: "memory") { MemoryChannel.pair(on: $0, capacity: 8192) }
    static let unix = ChannelKind(testDescription: "socketpair") { try SocketChannel.pair(on: $0) }

    static let unixPath = ChannelKind(testDescription: "unix") { loop in
        let directory = try TestDirectory()
        return try await connected(.unix(path: directory.file("s")), loop)
    }

    static let tcp = ChannelKind(testDescription: "tcp") { loop in
        try await connected(.inet(host: "127.0.0.1", port: 0), loop)
    }

    static func connected(_ address: SocketAddress, _ loop: EventLoop) async throws -> (any Channel, any Channel) {
        let listener = try await Listener.listen(on: address, loop: loop)
        defer { listener.close() }
        let client = try await SocketChannel.connect(to: listener.address, on: loop)
        return (client, try await listener.accept())
    }

    static func tls(over base: ChannelKind) -> ChannelKind {
        ChannelKind(testDescription: "tls over \(base.testDescription)") { loop in
            let (a, b) = try await base.pair(loop)
            let pki = try pki.get()
            let client = try pki.credentials(.client)
            let server = try pki.credentials(.server)
            async let accepted = TLSChannel.handshake(over: b, credentials: server)
            let connected = try await TLSChannel.handshake(over: a, credentials: client, hostname: "localhost")
            return (connected, try await accepted)
        }
    }

    static func buffered(over base: ChannelKind) -> ChannelKind {
        ChannelKind(testDescription: "buffered over \(base.testDescription)") { loop in
            let (a, b) = try await base.pair(loop)
            return (BufferedChannel(over: a), BufferedChannel(over: b))
        }
    }

    static let pipes = ChannelKind(testDescription: "pipes") { try DescriptorChannel.pair(on: $0) }

    /// Whether the kernel can connect a machine to itself over vsock, which takes its vsock_loopback module.
    static let hasVsock: Bool = {
        let fd = socket(AF_VSOCK, Int32(SOCK_STREAM.rawValue), 0)
        guard fd >= 0 else { return false }
        defer { close(fd) }
        // struct sockaddr_vm: family, reserved, port (any), context id (this machine), padding.
        var address = [UInt8](repeating: 0xff, count: 16)
        address.replaceSubrange(0..<4, with: [UInt8(AF_VSOCK), 0, 0, 0])
        address.replaceSubrange(8..<16, with: [1, 0, 0, 0, 0, 0, 0, 0])
        return address.withUnsafeBytes {
            bind(fd, $0.baseAddress!.assumingMemoryBound(to: sockaddr.self), 16) == 0
        }
    }()

    static let vsock = ChannelKind(testDescription: "vsock") { loop in
        try await connected(.vsock(cid: 1, port: UInt32.max), loop)
    }

    static func websocket(over base: ChannelKind) -> ChannelKind {
        ChannelKind(testDescription: "websocket over \(base.testDescription)") { loop in
            let (a, b) = try await base.pair(loop)
            async let accepted = WebSocketChannel.accept(over: b)
            let connected = try await WebSocketChannel.connect(over: a, host: "localhost")
            return (connected, try await accepted)
        }
    }

    /// A child process that carries its standard streams to a Unix socket and back.
    static let command = ChannelKind(testDescription: "command") { loop in
        let directory = try TestDirectory()
        let listener = try await Listener.listen(on: .unix(path: directory.file("s")), loop: loop)
        defer { listener.close() }
        let relay = """
            import os, socket, sys, threading
            s = socket.socket(socket.AF_UNIX)
            s.connect(sys.argv[1])
            def outward():
                try:
                    while data := os.read(0, 65536): s.sendall(data)
                    s.shutdown(socket.SHUT_WR)
                except OSError: pass
            threading.Thread(target=outward, daemon=True).start()
            try:
                while data := s.recv(65536):
                    while data: data = data[os.write(1, data):]
            except OSError: pass
            """
        let child = try CommandChannel(["python3", "-c", relay, directory.file("s")], on: loop)
        return (child, try await listener.accept())
    }

    /// A TCP connection that an sshd makes.
    static let ssh = ChannelKind(testDescription: "ssh") { loop in
        let server = try await SSHServer.shared.value
        let listener = try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
        defer { listener.close() }
        let configuration = SSHConfiguration(
            host: "127.0.0.1",
            port: server.port,
            user: server.user,
            knownHosts: server.directory.file("known_hosts"),
            identity: server.directory.file("id")
        )
        let channel = try await SSHChannel.connect(
            configuration,
            to: .tcp(host: "127.0.0.1", port: listener.address.port ?? 0),
            on: loop
        )
        return (channel, try await listener.accept())
    }

    static let all: [ChannelKind] =
        [
            memory, unix, unixPath, tcp, pipes, command, ssh, tls(over: memory), tls(over: unix), tls(over: tcp),
            tls(over: pipes), tls(over: tls(over: memory)), websocket(over: memory), websocket(over: tcp),
            websocket(over: tls(over: tcp)), tls(over: websocket(over: tls(over: unix))), tls(over: ssh),
            websocket(over: websocket(over: memory)), buffered(over: memory), buffered(over: unix), buffered(over: tcp),
        ] + (hasVsock ? [vsock] : [])
}

/// The behaviour that every stream channel has, whatever carries it.
@Suite(.timeLimit(.minutes(2)))
struct ChannelBehaviour {
    @Test(arguments: ChannelKind.all)
    func carriesABulkStreamInBothDirectionsAtOnceUnchanged(_ kind: ChannelKind) async throws {
        try await onLoop { loop in
            let (a, b) = try await kind.pair(loop)
            try await withThrowingTaskGroup(of: Void.self) { group in
                for (writer, reader, seed) in [(a, b, UInt8(1)), (b, a, UInt8(77))] {
                    // The sizes are those of QEMU's own channel tests: chunks that fit no buffer evenly.
                    group.addTask(executorPreference: loop) {
                        for round in 0..<250 {
                            let chunk = (0..<4194).map { seed &+ UInt8(truncatingIfNeeded: $0 &+ round) }
                            try await writer.write(chunk)
                        }
                    }
                    group.addTask(executorPreference: loop) {
                        for round in 0..<250 {
                            let chunk = try await reader.read(exactly: 4194)
                            #expect(chunk == (0..<4194).map { seed &+ UInt8(truncatingIfNeeded: $0 &+ round) })
                        }
                    }
                }
                try await group.waitForAll()
            }
            a.close()
            b.close()
        }
    }

    @Test(arguments: ChannelKind.all)
    func deliversTheEndAfterTheLastByteAndStillReadsTheOtherDirection(_ kind: ChannelKind) async throws {
        try await onLoop { loop in
            let (a, b) = try await kind.pair(loop)
            try await a.write(Array("last words".utf8))
            try await a.finishWriting()
            #expect(try await b.read(exactly: 10) == Array("last words".utf8))
            let buffer = IOBuffer(capacity: 16)
            #expect(try await b.readSome(into: buffer.mutable(0..<16)) == 0)
            try await b.write(Array("answer".utf8))
            #expect(try await a.read(exactly: 6) == Array("answer".utf8))
            a.close()
            b.close()
        }
    }

    @Test(arguments: ChannelKind.all)
    func gathersTwoPiecesIntoOneStream(_ kind: ChannelKind) async throws {
        try await onLoop { loop in
            let (a, b) = try await kind.pair(loop)
            let header = IOBuffer(copying: Array("header:".utf8))
            let payload = IOBuffer(copying: [UInt8](repeating: 9, count: 40000))
            async let sent: Void = a.writeAll(header.bytes(0..<7), payload.bytes(0..<40000))
            #expect(try await b.read(exactly: 7) == Array("header:".utf8))
            #expect(try await b.read(exactly: 40000) == [UInt8](repeating: 9, count: 40000))
            try await sent
            a.close()
            b.close()
        }
    }

    @Test(arguments: ChannelKind.all)
    func anEndInTheMiddleOfAMessageIsTruncation(_ kind: ChannelKind) async throws {
        try await onLoop { loop in
            let (a, b) = try await kind.pair(loop)
            try await a.write([1, 2, 3])
            try await a.finishWriting()
            let error = await #expect(throws: ChannelError.self) { try await b.read(exactly: 4) }
            #expect(error?.code == .truncated)
            a.close()
            b.close()
        }
    }

    @Test(arguments: ChannelKind.all)
    func cancellingTheTaskWakesABlockedReader(_ kind: ChannelKind) async throws {
        try await onLoop { loop in
            let (a, b) = try await kind.pair(loop)
            let reading = Task(executorPreference: loop) {
                try await b.withCancellation { try await b.read(exactly: 1) }
            }
            await Task.yield()
            reading.cancel()
            let error = await #expect(throws: ChannelError.self) { try await reading.value }
            #expect(error?.code == .cancelled)
            a.close()
            b.close()
        }
    }

    @Test(arguments: ChannelKind.all)
    func aDeadlineWakesABlockedReaderAndNamesTheActivity(_ kind: ChannelKind) async throws {
        try await onLoop { loop in
            let (a, b) = try await kind.pair(loop)
            let error = await #expect(throws: ChannelError.self) {
                try await b.withDeadline(.milliseconds(30), for: "The greeting") { try await b.read(exactly: 1) }
            }
            #expect(error?.code == .timedOut)
            #expect(error?.message.contains("The greeting") == true)
            a.close()
            b.close()
        }
    }

    @Test(arguments: ChannelKind.all)
    func aWriterWaitsForAPeerThatDoesNotReadAndAbortWakesIt(_ kind: ChannelKind) async throws {
        try await onLoop { loop in
            let (a, b) = try await kind.pair(loop)
            let writing = Task(executorPreference: loop) {
                let chunk = [UInt8](repeating: 5, count: 1 << 20)
                while true { try await a.write(chunk) }
            }
            // Nothing is read, so the writer fills every buffer on the way and then waits.
            for _ in 0..<200 { await Task.yield() }
            a.abort(ChannelError(.cancelled, "stopped by the test"))
            let error = await #expect(throws: ChannelError.self) { try await writing.value }
            #expect(error?.message == "stopped by the test")
            b.close()
        }
    }

    @Test(arguments: ChannelKind.all)
    func aClosedChannelFailsEveryCall(_ kind: ChannelKind) async throws {
        try await onLoop { loop in
            let (a, b) = try await kind.pair(loop)
            a.close()
            await #expect(throws: (any Error).self) { try await a.read(exactly: 1) }
            await #expect(throws: (any Error).self) { try await a.write([1]) }
            b.close()
        }
    }
}
