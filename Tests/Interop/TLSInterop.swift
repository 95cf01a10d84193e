import Glibc
import IO
import TLS
import TestSupport
import Testing

/// Our TLS sessions against GnuTLS's and OpenSSL's own programs and QEMU, in both roles, with the same credential directories.
@Suite(.timeLimit(.minutes(9)))
struct TLSInterop {
    let directory: TestDirectory
    let pki: TestPKI

    init() throws {
        directory = try TestDirectory()
        pki = try TestPKI()
    }

    /// What a peer program needs to know of the other end.
    struct Result: Sendable {
        var version: String
        var cipher: String
        var peer: TLSPeer
    }

    func write(_ text: String, _ name: String) -> String {
        let path = directory.file(name)
        let file = fopen(path, "w")
        fputs(text, file)
        fclose(file)
        return path
    }

    /// Makes a directory with `keys.psk`.
    func keys() -> String {
        let path = directory.directory("psk")
        let file = fopen("\(path)/keys.psk", "w")
        fputs("qemu:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\n", file)
        fclose(file)
        chmod("\(path)/keys.psk", 0o600)
        return path
    }

    /// Serves one connection of a program: says hello, reads `expected`.
    func serve(
        _ credentials: any TLSCredentials,
        expecting expected: String,
        from program: (UInt16) throws -> ChildProcess
    ) async throws -> Result {
        let loop = EventLoop(name: "server")
        defer { loop.stop() }
        let listener = try await loop.run {
            try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
        }
        let child = try program(listener.address.port ?? 0)
        return try await loop.run {
            let base = try await listener.accept()
            let channel: TLSChannel
            do {
                channel = try await TLSChannel.handshake(over: base, credentials: credentials)
            } catch { throw TestFailure("\(error); the program printed: \(child.output)\(child.errors)") }
            try await channel.write(Array("hello from crossdock\n".utf8))
            let text = try await channel.withDeadline(.seconds(20), for: "The answer") {
                try await channel.read(exactly: expected.utf8.count)
            }
            #expect(String(decoding: text, as: UTF8.self) == expected)
            try await child.wait(for: "our words") { child.output.contains("hello from crossdock") }
            let result = Result(
                version: channel.session.version,
                cipher: channel.session.cipher,
                peer: channel.session.peer
            )
            channel.close()
            listener.close()
            return result
        }
    }

    /// Connects to a program that serves.
    func connect(
        _ credentials: any TLSCredentials,
        to program: ChildProcess,
        port: UInt16,
        expecting expected: String? = nil
    ) async throws -> Result {
        let loop = EventLoop(name: "client")
        defer { loop.stop() }
        return try await loop.run {
            let address = SocketAddress.inet(host: "127.0.0.1", port: port)
            var base: SocketChannel?
            try await program.wait(for: "a listener") {
                base = try? await SocketChannel.connect(to: address, on: loop)
                return base != nil
            }
            let channel = try await TLSChannel.handshake(over: base!, credentials: credentials, hostname: "localhost")
            try await channel.write(Array("hello from crossdock\n".utf8))
            if let expected {
                let text = try await channel.withDeadline(.seconds(20), for: "The answer") {
                    try await channel.read(exactly: expected.utf8.count)
                }
                #expect(String(decoding: text, as: UTF8.self) == expected)
            } else {
                try await program.wait(for: "our words") { program.output.contains("hello from crossdock") }
            }
            let result = Result(
                version: channel.session.version,
                cipher: channel.session.cipher,
                peer: channel.session.peer
            )
            try await channel.finishWriting()
            channel.close()
            return result
        }
    }

    var host: String { pki.directory }

    // MARK: gnutls-cli and gnutls-serv

    @Test(arguments: ["NORMAL", "NORMAL:-VERS-TLS1.3"])
    func gnutlsCliConnectsToUs(_ priority: String) async throws {
        let result = try await serve(pki.credentials(.server), expecting: "hi\n") { port in
            try ChildProcess([
                "sh", "-c",
                "(echo hi; sleep 30) | gnutls-cli --priority '\(priority)' --x509cafile \(host)/ca-cert.pem "
                    + "--x509certfile \(host)/client-cert.pem --x509keyfile \(host)/client-key.pem -p \(port) "
                    + "--verify-hostname localhost 127.0.0.1",
            ])
        }
        #expect(result.version == (priority == "NORMAL" ? "1.3" : "1.2"))
        #expect(result.cipher == "AES-128-GCM")
        #expect(result.peer.distinguishedName == "CN=host")
        #expect(result.peer.alternativeNames == ["DNS:localhost", "IP:127.0.0.1", "IP:::1"])
    }

    @Test func gnutlsCliWithAKeyConnectsToUsAndGetsAESGCM() async throws {
        let server = try PSKCredentials(id: "p", directory: keys(), endpoint: .server)
        let result = try await serve(server, expecting: "hi\n") { port in
            try ChildProcess([
                "sh", "-c",
                "(echo hi; sleep 30) | gnutls-cli --priority NORMAL:+ECDHE-PSK:+DHE-PSK:+PSK --pskusername qemu "
                    + "--pskkey 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff -p \(port) 127.0.0.1",
            ])
        }
        #expect(result.peer.pskUser == "qemu")
        #expect(result.cipher.hasSuffix("-GCM"))
    }

    @Test(arguments: ["NORMAL", "NORMAL:-VERS-TLS1.3"])
    func weConnectToGnutlsServ(_ priority: String) async throws {
        let (server, port) = try await startServer { port in
            [
                "gnutls-serv", "--echo", "--priority", priority, "--x509cafile", "\(host)/ca-cert.pem",
                "--x509certfile",
                "\(host)/server-cert.pem", "--x509keyfile", "\(host)/server-key.pem", "--require-client-cert",
                "--verify-client-cert", "-p", "\(port)",
            ]
        }
        let result = try await connect(
            pki.credentials(.client),
            to: server,
            port: port,
            expecting: "hello from crossdock\n"
        )
        #expect(result.version == (priority == "NORMAL" ? "1.3" : "1.2"))
        #expect(result.cipher == "AES-128-GCM")
    }

    // MARK: openssl s_client and s_server

    @Test(arguments: ["-tls1_3", "-tls1_2"])
    func opensslConnectsToUs(_ version: String) async throws {
        let result = try await serve(pki.credentials(.server), expecting: "hi\n") { port in
            try ChildProcess([
                "sh", "-c",
                "(echo hi; sleep 30) | openssl s_client \(version) -quiet -verify_return_error -verify_hostname localhost "
                    + "-CAfile \(host)/ca-cert.pem -cert \(host)/client-cert.pem -key \(host)/client-key.pem "
                    + "-connect 127.0.0.1:\(port)",
            ])
        }
        #expect(result.version == (version == "-tls1_3" ? "1.3" : "1.2"))
        #expect(result.cipher == "AES-128-GCM")
    }

    @Test(arguments: ["-tls1_3", "-tls1_2"])
    func weConnectToOpenssl(_ version: String) async throws {
        let (server, port) = try await startServer { port in
            [
                "sh", "-c",
                "sleep 100 | openssl s_server \(version) -quiet -Verify 2 -verify_return_error -CAfile \(host)/ca-cert.pem "
                    + "-cert \(host)/server-cert.pem -key \(host)/server-key.pem -accept 127.0.0.1:\(port)",
            ]
        }
        let result = try await connect(pki.credentials(.client), to: server, port: port)
        #expect(result.version == (version == "-tls1_3" ? "1.3" : "1.2"))
        #expect(result.cipher == "AES-128-GCM")
    }

    @Test func anOldVersionIsRefused() async throws {
        let credentials = try pki.credentials(.server)
        let loop = EventLoop(name: "server")
        defer { loop.stop() }
        let listener = try await loop.run {
            try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
        }
        let child = try ChildProcess([
            "openssl", "s_client", "-tls1_1", "-cipher", "ALL:@SECLEVEL=0", "-connect",
            "127.0.0.1:\(listener.address.port ?? 0)",
        ])
        try await loop.run {
            let base = try await listener.accept()
            await #expect(throws: ChannelError.self) {
                try await TLSChannel.handshake(over: base, credentials: credentials)
            }
        }
        #expect(try await child.finish().code != 0)
    }

    // MARK: QEMU

    /// A QEMU whose serial port is a TLS socket; what comes in at the port goes out through a pipe of its own.
    func qemu(_ objects: [String], _ socket: String) throws -> ChildProcess {
        try ChildProcess(
            ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S"]
                + objects.flatMap { ["-object", $0] }
                + [
                    "-chardev", "stdio,id=out,signal=off", "-chardev", socket, "-qmp",
                    "unix:\(directory.file("qmp")),server=on,wait=off",
                ]
        )
    }

    /// Handshakes with a QEMU that connects to us, and looks at what was agreed.
    func qemuConnects(
        _ credentials: any TLSCredentials,
        _ objects: [String],
        hostname: String? = nil
    ) async throws -> Result {
        let loop = EventLoop(name: "server")
        defer { loop.stop() }
        let listener = try await loop.run {
            try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
        }
        let child = try qemu(
            objects,
            "socket,id=c,host=localhost,port=\(listener.address.port ?? 0),ipv6=off,tls-creds=tls0"
        )
        let watcher = Task { try await Self.giveUp(listener, whenEnded: child) }
        defer { watcher.cancel() }
        return try await loop.run {
            let base: SocketChannel
            do { base = try await listener.accept() } catch {
                throw TestFailure("\(error); QEMU printed: \(child.errors)")
            }
            do {
                let channel = try await TLSChannel.handshake(over: base, credentials: credentials)
                defer { channel.close() }
                return Result(
                    version: channel.session.version,
                    cipher: channel.session.cipher,
                    peer: channel.session.peer
                )
            } catch { throw TestFailure("\(error); QEMU printed: \(child.errors)") }
        }
    }

    /// Nobody waits for a program that has ended.
    private static func giveUp(_ listener: Listener, whenEnded child: ChildProcess) async throws {
        while child.isRunning { try await Task.sleep(for: .milliseconds(50)) }
        listener.abort()
    }

    func connectToQEMU(_ credentials: any TLSCredentials, _ objects: [String]) async throws -> Result {
        let port = try await freePort()
        let child = try qemu(
            objects,
            "socket,id=c,host=127.0.0.1,port=\(port),server=on,wait=off,tls-creds=tls0"
        )
        let loop = EventLoop(name: "client")
        defer { loop.stop() }
        return try await loop.run {
            let address = SocketAddress.inet(host: "127.0.0.1", port: port)
            var base: SocketChannel?
            try await child.wait(for: "QEMU's listener") {
                base = try? await SocketChannel.connect(to: address, on: loop)
                return base != nil
            }
            let channel = try await TLSChannel.handshake(over: base!, credentials: credentials, hostname: "localhost")
            defer { channel.close() }
            return Result(
                version: channel.session.version,
                cipher: channel.session.cipher,
                peer: channel.session.peer
            )
        }
    }

    @Test func qemuWithCertificatesInBothRoles() async throws {
        let ours = try await qemuConnects(
            pki.credentials(.server),
            ["tls-creds-x509,id=tls0,endpoint=client,dir=\(host)"]
        )
        #expect(ours.peer.distinguishedName == "CN=host")
        #expect(ours.version == "1.3" && ours.cipher == "AES-128-GCM")
        let theirs = try await connectToQEMU(
            pki.credentials(.client),
            ["tls-creds-x509,id=tls0,endpoint=server,dir=\(host)"]
        )
        #expect(theirs.version == "1.3" && theirs.cipher == "AES-128-GCM")
    }

    /// GnuTLS's own order for pre-shared keys has ChaCha20 before AES.
    @Test func qemuWithKeysAndItsDefaultSettingsGetsAESGCMInBothRoles() async throws {
        let keys = keys()
        let ours = try await qemuConnects(
            PSKCredentials(id: "p", directory: keys, endpoint: .server),
            ["tls-creds-psk,id=tls0,endpoint=client,dir=\(keys)"]
        )
        #expect(ours.peer.pskUser == "qemu")
        #expect(ours.version == "1.3" && ours.cipher == "AES-128-GCM")
        let theirs = try await connectToQEMU(
            PSKCredentials(id: "p", directory: keys, endpoint: .client),
            ["tls-creds-psk,id=tls0,endpoint=server,dir=\(keys)"]
        )
        #expect(theirs.version == "1.3" && theirs.cipher == "AES-128-GCM")
    }

    @Test func qemuWithoutAuthenticationInBothRoles() async throws {
        let ours = try await qemuConnects(
            AnonymousCredentials(id: "a", endpoint: .server),
            ["tls-creds-anon,id=tls0,endpoint=client"]
        )
        #expect(ours.peer.identities.isEmpty)
        #expect(ours.version == "1.2" && ours.cipher.hasSuffix("-GCM"))
        let theirs = try await connectToQEMU(
            AnonymousCredentials(id: "a", endpoint: .client),
            ["tls-creds-anon,id=tls0,endpoint=server"]
        )
        #expect(theirs.version == "1.2")
    }

    /// The whole transcript: a master key in a file, a passphrase on the command line, an encrypted private key.
    @Test func qemuTakesTheSecretsThatCrossdockEncrypts() async throws {
        let encrypted = directory.directory("encrypted")
        let key = directory.file("master.b64")
        let script = """
            cp \(host)/*.pem \(encrypted)/
            openssl pkcs8 -topk8 -v2 aes256 -in \(host)/client-key.pem -out \(encrypted)/client-key.pem -passout pass:letmein
            echo letmein | \(Tool.crossdock) secret encrypt --key \(key) --new-key --id sec0 --keyid secmaster
            """
        let made = try await Tool.run(["sh", "-c", script])
        #expect(made.code == 0, "\(made.errors)")
        let objects = [
            "secret,id=secmaster,format=base64,file=\(key)", String(made.output.dropLast()),
            "tls-creds-x509,id=tls0,endpoint=client,dir=\(encrypted),passwordid=sec0",
        ]
        let result = try await qemuConnects(pki.credentials(.server), objects)
        #expect(result.peer.distinguishedName == "CN=host")
        // We take the same objects.
        let store = ObjectStore()
        for object in objects { try store.add(ObjectDescription(parsing: object)) }
        #expect(try store.credentials("tls0", endpoint: .client).verifiesPeer)
        // No part of the secret shows where others can read it.
        let again = try await Tool.run([
            Tool.crossdock, "migrate", "nobody", "localhost", "--state-dir", directory.file("state"), "--tls-creds",
            "tls0",
            "--object", objects[0], "--object", objects[1],
        ])
        #expect(!again.all.contains("letmein"))
    }
}
