import Glibc
import IO
import TLS
import TestSupport
import Testing

/// Handshakes over memory; each side's error or nil.
func handshake(
    _ client: any TLSCredentials,
    _ server: any TLSCredentials,
    hostname: String?
) async throws -> (client: (any Error)?, server: (any Error)?, peers: [TLSPeer], cipher: String?) {
    let loop = EventLoop(name: "test")
    defer { loop.stop() }
    return try await loop.run {
        let (a, b) = MemoryChannel.pair(on: loop)
        let accepting = Task(executorPreference: loop) { try await TLSChannel.handshake(over: b, credentials: server) }
        var clientError: (any Error)?
        var connected: TLSChannel?
        do {
            let channel = try await TLSChannel.handshake(over: a, credentials: client, hostname: hostname)
            connected = channel
            // In TLS 1.3 the client is done before the server has judged the client's certificate.
            let reading = Task(executorPreference: loop) { try await channel.read(exactly: 1) }
            if let served = try? await accepting.value { try? await served.write([1]) }
            _ = try await reading.value
        } catch { clientError = error }
        let accepted = await accepting.result
        var serverError: (any Error)?
        if case .failure(let error) = accepted { serverError = error }
        let peers = [connected?.session.peer, try? accepted.get().session.peer].compactMap { $0 }
        return (clientError, serverError, peers, connected?.session.cipher)
    }
}

@Suite(.timeLimit(.minutes(1)))
struct TLSSessionTests {
    let pki: TestPKI

    init() throws { pki = try TestPKI() }

    @Test func mutualCertificatesIdentifyBothEndsAndUseAESGCM() async throws {
        let result = try await handshake(pki.credentials(.client), pki.credentials(.server), hostname: "localhost")
        #expect(result.client == nil && result.server == nil)
        #expect(result.peers.map(\.distinguishedName) == ["CN=host", "CN=host"])
        #expect(result.cipher == "AES-128-GCM")
    }

    @Test func anAddressIsMatchedAgainstTheAddressesInTheCertificate() async throws {
        let good = try await handshake(pki.credentials(.client), pki.credentials(.server), hostname: "127.0.0.1")
        #expect(good.client == nil)
        let bad = try await handshake(pki.credentials(.client), pki.credentials(.server), hostname: "127.0.0.2")
        #expect("\(bad.client!)".contains("does not match the host name '127.0.0.2'"))
    }

    /// The zone of a link-local address is the client's own: neither asked for in the certificate nor said to the server.
    @Test func theZoneOfALinkLocalAddressIsNoPartOfTheName() async throws {
        let directory = try pki.issue("linked", hosts: ["fe80::1"])
        let server = try pki.credentials(.server, directory: directory)
        let good = try await handshake(pki.credentials(.client), server, hostname: "fe80::1%eth0")
        #expect(good.client == nil && good.server == nil, "\(String(describing: good.client))")
        let bad = try await handshake(pki.credentials(.client), server, hostname: "fe80::2%eth0")
        #expect("\(bad.client!)".contains("does not match the host name 'fe80::2', but fe80::1"))
    }

    @Test func aWrongHostNameIsRefusedByTheClientAndNamed() async throws {
        let result = try await handshake(pki.credentials(.client), pki.credentials(.server), hostname: "other")
        #expect("\(result.client!)".contains("does not match the host name 'other'"))
        #expect(result.server != nil)
    }

    @Test func aClientWithoutCertificateIsRefused() async throws {
        let bare = pki.root.directory("bare")
        _ = try await Tool.run(["cp", "\(pki.directory)/ca-cert.pem", bare])
        let client = try pki.credentials(.client, directory: bare)
        let result = try await handshake(client, pki.credentials(.server), hostname: "localhost")
        #expect("\(result.server!)".contains("no certificate"))
        #expect("\(result.client!)".contains("client-cert.pem"))
    }

    @Test func aPeerOfAnotherAuthorityIsRefusedByEitherEnd() async throws {
        let other = try TestPKI()
        let foreignClient = try await handshake(
            mixed(key: other.directory, authority: pki.directory, .client),
            pki.credentials(.server),
            hostname: "localhost"
        )
        #expect("\(foreignClient.server!)".contains("not signed by the certificate authority"))
        let foreignServer = try await handshake(
            pki.credentials(.client),
            mixed(key: other.directory, authority: pki.directory, .server),
            hostname: "localhost"
        )
        #expect("\(foreignServer.client!)".contains("not signed by the certificate authority"))
    }

    /// One authority's certificate in a directory that trusts another authority.
    func mixed(key: String, authority: String, _ endpoint: TLSEndpoint) async throws -> X509Credentials {
        let directory = pki.root.directory("mixed-\(endpoint.rawValue)")
        for name in ["cert", "key"] {
            _ = try await Tool.run(["cp", "\(key)/\(endpoint.rawValue)-\(name).pem", directory])
        }
        _ = try await Tool.run(["cp", "\(authority)/ca-cert.pem", directory])
        return try pki.credentials(endpoint, directory: directory)
    }

    @Test func anExpiredOrFutureCertificateIsRefusedByThePeer() async throws {
        let expired = try pki.issue("expired", hosts: ["localhost"], starts: -7200, ends: -3600)
        let future = try pki.issue("future", hosts: ["localhost"], starts: 3600, ends: 7200)
        let client = try await handshake(
            pki.credentials(.client, directory: expired),
            pki.credentials(.server),
            hostname: "localhost"
        )
        #expect("\(client.server!)".contains("expired"))
        #expect("\(client.client!)".contains("expired"))
        let server = try await handshake(
            pki.credentials(.client),
            pki.credentials(.server, directory: future),
            hostname: "localhost"
        )
        #expect("\(server.client!)".contains("not yet valid"))
    }

    @Test func ourOwnExpiredCertificateIsRefusedWhenItIsLoaded() throws {
        let expired = try pki.issue("expired", hosts: ["localhost"], starts: -7200, ends: -3600)
        let error = #expect(throws: CredentialError.self) {
            try pki.credentials(.client, directory: expired, sanityCheck: true)
        }
        #expect(error?.message.contains("\(expired)/client-cert.pem has expired") == true)
    }

    @Test func aClientThatVerifiesNeedsAHostName() async throws {
        let result = try await handshake(pki.credentials(.client), pki.credentials(.server), hostname: nil)
        #expect("\(result.client!)".contains("No hostname for certificate validation"))
    }

    @Test func preSharedKeysIdentifyTheUserAndUseAESGCM() async throws {
        let directory = try TestDirectory()
        let made = try await Tool.run([
            "sh", "-c", "echo alice:00112233445566778899aabbccddeeff > \(directory.path)/keys.psk",
        ])
        #expect(made.code == 0)
        let server = try PSKCredentials(id: "p", directory: directory.path, endpoint: .server)
        let alice = try PSKCredentials(id: "p", directory: directory.path, endpoint: .client, username: "alice")
        let good = try await handshake(alice, server, hostname: nil)
        #expect(good.client == nil && good.server == nil)
        #expect(good.peers.last?.pskUser == "alice")
        #expect(good.cipher == "AES-128-GCM")
        let error = #expect(throws: CredentialError.self) {
            try PSKCredentials(id: "p", directory: directory.path, endpoint: .client)
        }
        #expect(error?.message.contains("Username qemu not found") == true)
    }

    @Test func anUnknownUserAndOneWithAZeroByteAreNobodyElse() async throws {
        let directory = try TestDirectory()
        _ = try await Tool.run([
            "sh", "-c",
            "echo alice:00112233445566778899aabbccddeeff > \(directory.path)/keys.psk; "
                + "echo '#616c6963650078:ffeeddccbbaa99887766554433221100' >> \(directory.path)/keys.psk",
        ])
        let server = try PSKCredentials(id: "p", directory: directory.path, endpoint: .server)
        let client = try TestDirectory()
        _ = try await Tool.run(["sh", "-c", "echo mallory:00112233445566778899aabbccddeeff > \(client.path)/keys.psk"])
        let stranger = try PSKCredentials(id: "p", directory: client.path, endpoint: .client, username: "mallory")
        let result = try await handshake(stranger, server, hostname: nil)
        #expect(result.client != nil && result.server != nil)
    }

    @Test func aWrongPreSharedKeyFailsOnBothEnds() async throws {
        let good = try TestDirectory()
        let bad = try TestDirectory()
        _ = try await Tool.run(["sh", "-c", "echo qemu:00112233445566778899aabbccddeeff > \(good.path)/keys.psk"])
        _ = try await Tool.run(["sh", "-c", "echo qemu:ff112233445566778899aabbccddeeff > \(bad.path)/keys.psk"])
        let result = try await handshake(
            PSKCredentials(id: "p", directory: bad.path, endpoint: .client),
            PSKCredentials(id: "p", directory: good.path, endpoint: .server),
            hostname: nil
        )
        #expect(result.client != nil && result.server != nil)
    }

    /// Whoever learns the key later must not be able to read what was recorded: plain PSK is refused.
    @Test(
        arguments: [
            (["-tls1_2", "-cipher", "PSK-AES128-GCM-SHA256"], false),
            (["-tls1_2", "-cipher", "ECDHE-PSK-CHACHA20-POLY1305"], true),
            (["-tls1_3", "-ciphersuites", "TLS_AES_128_GCM_SHA256"], true),
        ]
    )
    func aKeyThatIsInNoFileIsUsedWithEphemeralKeysOnly(_ words: [String], _ isAccepted: Bool) async throws {
        var key: [UInt8] = Array(0..<16)
        let server = try PSKCredentials(
            id: "p",
            key: SecretBytes(wiping: &key),
            user: "joiner",
            endpoint: .server
        )
        let loop = EventLoop(name: "test")
        defer { loop.stop() }
        let listener = try await loop.run {
            try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
        }
        guard case .inet(_, let port) = listener.address else { throw TestFailure("no port") }
        let accepting = Task(executorPreference: loop) {
            let channel = try await TLSChannel.handshake(over: try await listener.accept(), credentials: server)
            channel.close()
        }
        let client = try await Tool.run(
            ["timeout", "20", "openssl", "s_client", "-connect", "127.0.0.1:\(port)", "-psk_identity", "joiner"]
                + ["-psk", "000102030405060708090a0b0c0d0e0f"] + words
        )
        let result = await accepting.result
        try await loop.run { listener.close() }
        switch result {
        case .success: #expect(isAccepted, "\(client.all)")
        case .failure(let error): #expect(!isAccepted, "\(error): \(client.all)")
        }
    }

    @Test func truncationIsAnErrorAndCloseNotifyIsAnEnd() async throws {
        let client = try pki.credentials(.client)
        let server = try pki.credentials(.server)
        try await onLoop { loop in
            for orderly in [true, false] {
                let (a, b) = MemoryChannel.pair(on: loop)
                async let accepted = TLSChannel.handshake(over: b, credentials: server)
                let connected = try await TLSChannel.handshake(over: a, credentials: client, hostname: "localhost")
                let peer = try await accepted
                if orderly { try await connected.finishWriting() } else { try await a.finishWriting() }
                let buffer = IOBuffer(capacity: 16)
                if orderly {
                    #expect(try await peer.readSome(into: buffer.mutable(0..<16)) == 0)
                } else {
                    let error = await #expect(throws: ChannelError.self) {
                        try await peer.readSome(into: buffer.mutable(0..<16))
                    }
                    #expect(error?.code == .truncated)
                }
            }
        }
    }

    @Test func aPeerThatDoesNotSpeakTLSIsToldApart() async throws {
        let client = try pki.credentials(.client)
        try await onLoop { loop in
            let (a, b) = MemoryChannel.pair(on: loop)
            try await b.write(Array("HTTP/1.1 400 Bad Request\r\n\r\n".utf8))
            let error = await #expect(throws: ChannelError.self) {
                try await TLSChannel.handshake(over: a, credentials: client, hostname: "localhost")
            }
            #expect(error?.message.contains("does not speak TLS") == true)
        }
    }

    @Test func aSilentPeerIsGivenUpAtTheDeadline() async throws {
        let client = try pki.credentials(.client)
        try await onLoop { loop in
            let (a, b) = MemoryChannel.pair(on: loop)
            let error = await #expect(throws: ChannelError.self) {
                try await TLSChannel.handshake(
                    over: a,
                    credentials: client,
                    hostname: "localhost",
                    timeout: .milliseconds(50)
                )
            }
            #expect(error?.code == .timedOut)
            b.close()
        }
    }
}
