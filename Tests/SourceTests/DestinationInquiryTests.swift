import Emulator
import IO
import Migration
import Source
import TLS
import TestSupport
import Testing

/// What an operator's word is worth against each kind of answer, with real sockets and real TLS.
@Suite(.timeLimit(.minutes(2)))
struct DestinationInquiryTests {
    static func plan(_ port: UInt16, host: String = "127.0.0.1") -> MigrationPlan {
        MigrationPlan(id: "1-abc", guest: "web1", host: host, port: port, stateDirectory: "/nonexistent")
    }

    /// Asks a port of this host, and says what its only address answered.
    static func ask(_ port: UInt16, _ pki: TestPKI, patience: Duration = .seconds(10)) async throws
        -> DestinationInquiry
    {
        let credentials = try pki.credentials(.client)
        return try await withLoop { loop in
            try await DestinationInquiry.ask(plan(port), credentials: credentials, on: loop, patience: patience)
        }
    }

    /// Runs a body on a loop of its own.
    static func withLoop<T: Sendable>(_ body: @escaping @Sendable (EventLoop) async throws -> T) async throws -> T {
        let loop = EventLoop(name: "inquiry")
        defer { loop.stop() }
        return try await loop.run { try await body(loop) }
    }

    /// Asks a listener whose connections go through `serve`.
    static func ask(
        _ pki: TestPKI,
        patience: Duration = .seconds(10),
        serve: @escaping @Sendable (SocketChannel) async throws -> Void
    ) async throws -> DestinationInquiry {
        let credentials = try pki.credentials(.client)
        return try await withLoop { loop in
            let listener = try await Listener.listen(on: .inet(host: "127.0.0.1", port: 0), loop: loop)
            defer { listener.close() }
            Task(executorPreference: loop) {
                let channel = try await listener.accept()
                try? await serve(channel)
            }
            let port = listener.address.port ?? 0
            return try await DestinationInquiry.ask(plan(port), credentials: credentials, on: loop, patience: patience)
        }
    }

    /// A destination agent of few words.
    static func agent(
        _ pki: TestPKI,
        says answer: @escaping @Sendable (Message) -> Message?
    ) async throws -> DestinationInquiry {
        let credentials = try pki.credentials(.server)
        return try await ask(pki) { socket in
            let connection = MessageConnection(try await TLSChannel.handshake(over: socket, credentials: credentials))
            while true {
                guard let message = answer(try await connection.receiveMessage()) else { return socket.close() }
                try await connection.send(message)
            }
        }
    }

    static func claim(off: Bool = false, erased: String? = nil) -> OwnershipClaim {
        OwnershipClaim(user: "root", isOtherHostOff: off, erasedHost: erased)
    }

    /// Whether the claim takes the guest; nil when there is nothing to override.
    static func isTaken(_ inquiry: DestinationInquiry, _ claim: OwnershipClaim) -> Bool? {
        switch inquiry.ruling(on: claim, of: plan(1), host: "host-b") {
        case .decided: nil
        case .taken: true
        case .refused(let error): error.code == .undecided ? false : nil
        }
    }

    static func expectSilence(_ inquiry: DestinationInquiry, _ source: SourceLocation = #_sourceLocation) {
        #expect(inquiry.isSilent, "\(inquiry.sentence)", sourceLocation: source)
        #expect(isTaken(inquiry, claim()) == false, sourceLocation: source)
        #expect(isTaken(inquiry, claim(erased: "host-b")) == false, sourceLocation: source)
        #expect(isTaken(inquiry, claim(off: true)) == true, sourceLocation: source)
    }

    static func expectStranger(
        _ inquiry: DestinationInquiry,
        _ words: String,
        _ source: SourceLocation = #_sourceLocation
    ) {
        #expect(!inquiry.isSilent && !inquiry.isDecided, sourceLocation: source)
        #expect(inquiry.sentence.contains(words), "\(inquiry.sentence)", sourceLocation: source)
        #expect(isTaken(inquiry, claim()) == false, sourceLocation: source)
        #expect(isTaken(inquiry, claim(off: true)) == false, sourceLocation: source)
        #expect(isTaken(inquiry, claim(erased: "host-c")) == false, sourceLocation: source)
        #expect(isTaken(inquiry, claim(erased: "host-b")) == true, sourceLocation: source)
    }

    /// A stopped agent, on a host that is up.
    @Test func aListenerThatTakesTheConnectionAndSaysNothingIsAnAnswer() async throws {
        let inquiry = try await Self.ask(try TestPKI(), patience: .milliseconds(300)) { channel in
            _ = try await channel.read(exactly: 1 << 20)
        }
        Self.expectStranger(inquiry, "nothing came")
    }

    @Test func aNameThatCannotBeResolvedIsSilence() async throws {
        let credentials = try TestPKI().credentials(.client)
        let inquiry = try await Self.withLoop { loop in
            try await DestinationInquiry.ask(
                Self.plan(10808, host: "no-such-host.invalid"),
                credentials: credentials,
                on: loop
            )
        }
        Self.expectSilence(inquiry)
    }

    @Test func aClosedPortIsAnAnswer() async throws {
        Self.expectStranger(try await Self.ask(try await freePort(), try TestPKI()), "refused")
    }

    @Test func aConnectionThatIsClosedAtOnceIsAnAnswer() async throws {
        Self.expectStranger(try await Self.ask(try TestPKI()) { $0.close() }, "127.0.0.1:")
    }

    @Test func aCertificateOfAnotherAuthorityIsAnAnswer() async throws {
        let strangers = try TestPKI().credentials(.server)
        let inquiry = try await Self.ask(try TestPKI()) { socket in
            _ = try await TLSChannel.handshake(over: socket, credentials: strangers)
        }
        Self.expectStranger(inquiry, "certificate")
    }

    @Test func somethingThatSpeaksAnotherProtocolIsAnAnswer() async throws {
        let inquiry = try await Self.ask(try TestPKI()) { try await $0.write(Array("SSH-2.0-OpenSSH_9.2\r\n".utf8)) }
        Self.expectStranger(inquiry, "127.0.0.1:")
    }

    @Test func anAgentThatRefusesThisHostIsAnAnswer() async throws {
        let inquiry = try await Self.agent(try TestPKI()) { _ in
            .abort("This agent does not let 'CN=host' migrate guests to it")
        }
        Self.expectStranger(inquiry, "does not let 'CN=host'")
    }

    @Test func anAgentThatProvesWhoItIsAndSaysNothingIsAnAnswer() async throws {
        let pki = try TestPKI()
        let server = try pki.credentials(.server)
        let inquiry = try await Self.ask(pki, patience: .seconds(1)) { socket in
            let channel = try await TLSChannel.handshake(over: socket, credentials: server)
            _ = try await channel.read(exactly: 1 << 20)
        }
        Self.expectStranger(inquiry, "proved who it is")
    }

    @Test func anAgentThatDoesNotKnowTheMigrationIsAnAnswer() async throws {
        let inquiry = try await Self.agent(try TestPKI()) { _ in .welcome(.init(state: .new)) }
        Self.expectStranger(inquiry, "does not know migration 1-abc")
    }

    @Test(arguments: [DestinationState.offered, .prepared])
    func anAgentThatKnowsTheMigrationWasNotErased(_ state: DestinationState) async throws {
        let inquiry = try await Self.agent(try TestPKI()) { message in
            if case .hello = message { .welcome(.init(state: state)) } else { nil }
        }
        #expect(Self.isTaken(inquiry, Self.claim(off: true)) == false)
        #expect(Self.isTaken(inquiry, Self.claim(off: true, erased: "host-b")) == false)
        #expect(inquiry.sentence.contains(state.rawValue), "\(inquiry.sentence)")
    }

    @Test(arguments: [Message.owned(.init(digests: [:])), .refused("its disk is damaged")])
    func aDestinationThatHasDecidedIsNotOverridden(_ answer: Message) async throws {
        let inquiry = try await Self.agent(try TestPKI()) { message in
            if case .hello = message { .welcome(.init(state: .prepared)) } else { answer }
        }
        #expect(inquiry.isDecided, "\(inquiry.sentence)")
        #expect(Self.isTaken(inquiry, Self.claim(off: true, erased: "host-b")) == nil)
    }

    /// One address that answers is enough, and each is told.
    @Test func everyAddressOfTheNameCounts() {
        let inquiry = DestinationInquiry([
            .init(address: "192.0.2.1:10808", answer: .silence("no route")),
            .init(address: "192.0.2.2:10808", answer: .stranger("connection refused")),
        ])
        Self.expectStranger(inquiry, "192.0.2.1:10808: no route; 192.0.2.2:10808: connection refused")
    }

    @Test func theJournalNamesWhatTheOperatorVouchedFor() {
        #expect(Self.claim(off: true).author == "root, with 'crossdock recover --take-ownership --other-host-is-off'")
        #expect(
            Self.claim(erased: "host-b").author
                == "root, with 'crossdock recover --take-ownership --other-host-was-erased host-b'"
        )
        let arguments = Self.claim(off: true).arguments(migration: "1-abc")
        #expect(arguments["other-host-is-off"]?.bool == true && arguments["migration"]?.string == "1-abc")
        #expect(Self.claim(erased: "host-b").arguments(migration: "1-abc")["other-host-was-erased"]?.string == "host-b")
    }
}
