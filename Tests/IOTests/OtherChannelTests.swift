import Glibc
import IO
import TestSupport
import Testing

/// Channels that are no two-ended streams, and what only some streams can do.
@Suite(.timeLimit(.minutes(2)))
struct OtherChannelTests {
    // MARK: File, buffer, null

    @Test func aFileIsWrittenSoughtAndReadAgain() async throws {
        let directory = try TestDirectory()
        try await onLoop { loop in
            let path = directory.file("f")
            let file = try FileChannel(path: path, flags: O_RDWR | O_CREAT, on: loop)
            #expect(file.features.contains(.seekable))
            try await file.write(Array("hello world".utf8))
            try file.seek(6)
            #expect(try await file.read(exactly: 5) == Array("world".utf8))
            let buffer = IOBuffer(capacity: 1)
            #expect(try await file.readSome(into: buffer.mutable(0..<1)) == 0)
            #expect(try file.seek(-5, from: SEEK_END) == 6)
            file.close()
            await #expect(throws: ChannelError.self) { try await file.write([1]) }
            for bad in [directory.path, directory.file("none")] {
                let error = #expect(throws: ChannelError.self) { try FileChannel(path: bad, flags: O_RDONLY, on: loop) }
                #expect(error?.message.contains(bad) == true)
            }
            mkfifo(directory.file("fifo"), 0o600)
            let error = #expect(throws: ChannelError.self) {
                try FileChannel(path: directory.file("fifo"), flags: O_RDONLY, on: loop)
            }
            #expect(error?.message.contains("neither a plain file nor a block device") == true)
        }
    }

    @Test func aBufferGrowsOverwritesAndIsBounded() async throws {
        try await onLoop { loop in
            let buffer = BufferChannel(Array("abcdef".utf8), limit: 8, on: loop)
            #expect(try await buffer.read(exactly: 2) == Array("ab".utf8))
            try await buffer.write(Array("XY".utf8))
            #expect(buffer.contents == Array("abXYef".utf8))
            try buffer.seek(to: 6)
            try await buffer.write(Array("gh".utf8))
            await #expect(throws: ChannelError.self) { try await buffer.write([1]) }
            try buffer.seek(to: 0)
            #expect(try await buffer.read(exactly: 8) == Array("abXYefgh".utf8))
            #expect(throws: ChannelError.self) { try buffer.seek(to: 9) }
            let empty = IOBuffer(capacity: 1)
            #expect(try await buffer.readSome(into: empty.mutable(0..<1)) == 0)
        }
    }

    @Test func nullTakesEverythingAndHasNothing() async throws {
        try await onLoop { loop in
            let null = NullChannel(on: loop)
            try await null.write([UInt8](repeating: 1, count: 1 << 20))
            let buffer = IOBuffer(capacity: 1)
            #expect(try await null.readSome(into: buffer.mutable(0..<1)) == 0)
            null.close()
            await #expect(throws: ChannelError.self) { try await null.write([1]) }
        }
    }

    // MARK: Datagrams

    @Test func datagramsKeepTheirBoundariesAndTellTheirSender() async throws {
        try await onLoop { loop in
            for host in ["127.0.0.1", "::1"] {
                let a = try await DatagramChannel.open(local: .inet(host: host, port: 0), on: loop)
                let b = try await DatagramChannel.open(
                    local: .inet(host: host, port: 0),
                    remote: a.localAddress,
                    on: loop
                )
                try await b.send([1, 2, 3])
                try await b.send([])
                try await b.send([UInt8](repeating: 4, count: 3000))
                let first = try await a.receive()
                #expect(first.message == [1, 2, 3] && first.sender == b.localAddress && !first.isTruncated)
                #expect(try await a.receive().message.isEmpty)
                let cut = try await a.receive(limit: 10)
                #expect(cut.message.count == 10 && cut.isTruncated)
                try await a.send([9], to: first.sender)
                #expect(try await b.receive().message == [9])
                await #expect(throws: ChannelError.self) { try await b.send([1], to: first.sender) }
                a.close()
                b.close()
                await #expect(throws: ChannelError.self) { try await a.receive() }
            }
        }
    }

    // MARK: Open files

    @Test func openFilesTravelOverUnixSocketsOnly() async throws {
        let directory = try TestDirectory()
        try await onLoop { loop in
            let (a, b) = try SocketChannel.pair(on: loop)
            #expect(a.features.contains(.passesDescriptors))
            let fd = open(directory.file("f"), O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
            defer { close(fd) }
            try await a.write(Array("three files".utf8), passing: [fd, fd, fd])
            let buffer = IOBuffer(capacity: 64)
            let (count, taken) = try await b.readSome(into: buffer.mutable(0..<64), receiving: 4)
            #expect(count == 11 && taken.count == 3)
            for descriptor in taken {
                #expect(fcntl(descriptor, F_GETFD) & FD_CLOEXEC != 0)
                #expect(write(descriptor, "x", 1) == 1)
                close(descriptor)
            }
            #expect(lseek(fd, 0, SEEK_END) == 3)
            // Who does not ask for files, or for fewer, keeps none open.
            let before = try openDescriptors()
            try await a.write([1], passing: [fd, fd])
            let error = await #expect(throws: ChannelError.self) {
                try await b.readSome(into: buffer.mutable(0..<64), receiving: 1)
            }
            #expect(error?.message.contains("more than 1 open files") == true)
            try await a.write([2], passing: [fd])
            #expect(try await b.read(exactly: 1) == [2])
            #expect(try openDescriptors() == before)
            let (tcp, _) = try await ChannelKind.connected(.inet(host: "127.0.0.1", port: 0), loop)
            #expect(!tcp.features.contains(.passesDescriptors))
            await #expect(throws: ChannelError.self) { try await (tcp as! SocketChannel).write([1], passing: [fd]) }
        }
    }

    /// Descriptors of this process that are sockets or files of the test; other tests open theirs at the same time, so only
    /// those of plain files are counted.
    func openDescriptors() throws -> Int {
        (0..<1024).count { fd in
            var status = stat()
            return fstat(Int32(fd), &status) == 0 && status.st_mode & S_IFMT == S_IFREG && status.st_size == 3
        }
    }

    // MARK: Commands and standard streams

    @Test func aCommandIsSpokenToAndItsExitCodeTold() async throws {
        try await onLoop { loop in
            let cat = try CommandChannel(["cat"], on: loop)
            try await cat.write(Array("there and back".utf8))
            try await cat.finishWriting()
            #expect(try await cat.read(exactly: 14) == Array("there and back".utf8))
            #expect(await cat.waitForExit() == 0)
            let failing = try CommandChannel(["sh", "-c", "exit 7"], on: loop)
            #expect(await failing.waitForExit() == 7)
            let stubborn = try CommandChannel(
                ["sh", "-c", "trap '' TERM; while :; do read x || sleep 1000; done"],
                on: loop
            )
            stubborn.close()
            #expect(await stubborn.waitForExit() == 128 + SIGKILL)
            let error = #expect(throws: ChannelError.self) { try CommandChannel(["/no/such/program"], on: loop) }
            #expect(error?.message.contains("start /no/such/program") == true)
        }
    }

    @Test func standardInputAndOutputArePipesSocketsOrFiles() async throws {
        let directory = try TestDirectory()
        let echo = Tool.built("standard-echo")
        let bytes = (0..<300_000).map { UInt8(truncatingIfNeeded: $0 &* 13) }
        try await onLoop { loop in
            let piped = try CommandChannel([echo], on: loop)
            async let sent: Void = {
                try await piped.write(bytes)
                try await piped.finishWriting()
            }()
            #expect(try await piped.read(exactly: bytes.count) == bytes)
            try await sent
            let buffer = IOBuffer(capacity: 1)
            #expect(try await piped.readSome(into: buffer.mutable(0..<1)) == 0)
            #expect(await piped.waitForExit() == 0)
        }
        // A file whose beginning somebody else has read already, and a socket as inetd hands it over.
        let script = """
            printf 'skipped kept' > \(directory.path)/in
            (dd bs=1 count=8 of=/dev/null status=none; \(echo) > \(directory.path)/out) < \(directory.path)/in
            cat \(directory.path)/out
            /usr/bin/python3 -c '
            import socket, subprocess, sys
            a, b = socket.socketpair()
            child = subprocess.Popen([sys.argv[1]], stdin=b, stdout=b)
            b.close()
            a.sendall(b" socket"); a.shutdown(socket.SHUT_WR)
            data = b""
            while piece := a.recv(100): data += piece
            sys.stdout.write(data.decode() + " " + str(child.wait()))
            ' \(echo)
            """
        let result = try await Tool.run(["sh", "-c", script])
        #expect(result.output == "kept socket 0", "\(result.all)")
    }

    // MARK: Listeners

    @Test func oneListenerServesAllAddressesOfANameOnOnePort() async throws {
        let directory = try TestDirectory()
        try await onLoop { loop in
            let listener = try await NetworkListener.listen(
                on: [.inet(host: "127.0.0.1", port: 0), .inet(host: "::1", port: 0), .unix(path: directory.file("s"))],
                loop: loop
            )
            #expect(listener.addresses.count == 3)
            let serving = Task(executorPreference: loop) {
                await listener.serve { channel in
                    try? await channel.write(Array("hi".utf8))
                    channel.close()
                }
            }
            for address in listener.addresses.map({ address -> SocketAddress in
                if case .unix = address { return .unix(path: directory.file("s")) } else { return address }
            }) {
                let channel = try await SocketChannel.connect(to: address, on: loop)
                #expect(try await channel.read(exactly: 2) == Array("hi".utf8))
            }
            listener.close()
            await serving.value
            // Every address of the machine, and one port for all.
            let everywhere = try await NetworkListener.listen(on: [.inet(host: "", port: 0)], loop: loop)
            #expect(Set(everywhere.addresses.map(\.port)).count == 1)
            everywhere.close()
            // One bad address, and none is listened on.
            await #expect(throws: ChannelError.self) {
                try await NetworkListener.listen(
                    on: [.unix(path: directory.file("t")), .inet(host: "192.0.2.1", port: 0)],
                    loop: loop
                )
            }
            #expect(access(directory.file("t"), F_OK) != 0)
        }
    }

    @Test func anInheritedDescriptorMustBeAListeningSocket() async throws {
        try await onLoop { loop in
            // Another process is meant, so there is nothing for us.
            let inherited = try NetworkListener.inherited(loop: loop)
            #expect(inherited == nil)
            let fd = open("/dev/null", O_RDONLY | O_CLOEXEC)
            defer { close(fd) }
            #expect(throws: ChannelError.self) { try Listener(inheriting: fd, on: loop) }
        }
    }

    @Test func aNameThatNobodyKnowsIsToldAsSuch() async throws {
        try await onLoop { loop in
            let error = await #expect(throws: ChannelError.self) {
                try await SocketChannel.connect(to: .inet(host: "name.invalid", port: 1), on: loop)
            }
            #expect(error?.code == .unresolved)
            #expect(error?.message.contains("name.invalid") == true)
        }
    }

    @Test func resolvingANameDoesNotBlockTheLoop() async throws {
        let directory = try TestDirectory()
        let configuration = directory.file("resolv.conf")
        let text = "nameserver 127.0.0.1\noptions timeout:20 attempts:1\n"
        try DurableFile.write(Array(text.utf8), to: configuration, mode: 0o644)
        let resolver = ["sh", "-c", "mount --bind \(configuration) /etc/resolv.conf && exec \"$@\"", "sh"]
        let loopback = ["sh", "-c", "ip link set lo up && exec \"$@\"", "sh"]
        let result = try await Tool.run(
            Namespace.mount + resolver + Namespace.network + loopback + [Tool.built("name-lookup")]
        )
        #expect(result.output == "the loop turned meanwhile\n", "\(result.all)")
    }

    @Test func addressesAndPacketControlsReachTheSocketThroughEveryLayer() async throws {
        try await onLoop { loop in
            let kind = ChannelKind.tls(over: .websocket(over: .tcp))
            let (a, b) = try await kind.pair(loop)
            #expect(a.localAddress != nil && a.localAddress == b.peerAddress)
            #expect(a.features.contains(.secure))
            a.setCork(true)
            a.setDelay(true)
            try await a.write([1, 2, 3])
            a.setCork(false)
            a.setDelay(false)
            #expect(try await b.read(exactly: 3) == [1, 2, 3])
            a.close()
            b.close()
        }
    }

    @Test(arguments: [("vsock:2:1024", true), ("vsock:2", false), ("vsock:a:b", false), ("vsock:2:3:4", false)])
    func vsockAddressesAreTwoNumbers(_ text: String, _ good: Bool) {
        let address = try? SocketAddress(parsing: text, defaultPort: 1)
        #expect((address != nil) == good)
        if let address { #expect(address.description == text) }
    }

    // MARK: SSH

    @Test func sshRunsACommandAndEndsOrderly() async throws {
        let server = try await SSHServer.shared.value
        try await onLoop { loop in
            let channel = try await SSHChannel.connect(
                self.configuration(server),
                to: .command("cat; echo done"),
                on: loop
            )
            try await channel.write(Array("through ssh\n".utf8))
            try await channel.finishWriting()
            #expect(try await channel.read(exactly: 17) == Array("through ssh\ndone\n".utf8))
            let buffer = IOBuffer(capacity: 1)
            #expect(try await channel.readSome(into: buffer.mutable(0..<1)) == 0)
            channel.close()
        }
    }

    func configuration(_ server: SSHServer, hosts: String = "known_hosts", key: String = "id") -> SSHConfiguration {
        SSHConfiguration(
            host: "127.0.0.1",
            port: server.port,
            user: server.user,
            knownHosts: server.directory.file(hosts),
            identity: server.directory.file(key)
        )
    }

    @Test(arguments: [
        ("no_hosts", "id", "is not in"), ("wrong_hosts", "id", "is not the one in"), ("nowhere", "id", "is not in"),
        ("known_hosts", "stranger", "does not accept the key"), ("known_hosts", "nothing", "it is not there"),
        ("known_hosts", "config", "it is damaged"),
    ])
    func sshRefusesUnknownHostsAndTellsWhichKeyFailed(_ hosts: String, _ key: String, _ words: String) async throws {
        let server = try await SSHServer.shared.value
        try await onLoop { loop in
            let error = await #expect(throws: ChannelError.self) {
                try await SSHChannel.connect(
                    self.configuration(server, hosts: hosts, key: key),
                    to: .command("true"),
                    on: loop
                )
            }
            #expect(error?.message.contains(words) == true, "\(error?.message ?? "")")
            if words.contains("in") && hosts != "known_hosts" { #expect(error?.message.contains("SHA256:") == true) }
        }
    }

    @Test func sshTellsWhereItsServerCannotConnect() async throws {
        let server = try await SSHServer.shared.value
        try await onLoop { loop in
            let error = await #expect(throws: ChannelError.self) {
                try await SSHChannel.connect(self.configuration(server), to: .tcp(host: "127.0.0.1", port: 1), on: loop)
            }
            #expect(error?.message.contains("does not open a channel to 127.0.0.1:1") == true)
        }
    }
}
