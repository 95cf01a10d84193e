import IO
import TLS
import TestSupport
import Testing

@testable import NBD

/// Our client against a server that does one thing wrong.
@Suite(.timeLimit(.minutes(1)))
struct ClientStrictnessTests {
    /// Opens the export and uses it as a copy would: a read, a block status, a write.
    static func use(_ fault: Misbehaviour, _ options: NBDClientOptions) async throws {
        try await onLoop { loop in
            let (near, far) = MemoryChannel.pair(on: loop, capacity: 256 << 10)
            let serving = Task(executorPreference: loop) { try? await MisbehavingServer(fault).serve(far) }
            defer { near.close() }
            let connection = try await NBDConnection.open(over: near, options)
            let data = Payload(IOBuffer(capacity: 4096), 0..<4096)
            func complete(_ body: () async throws -> Void) async throws {
                do {
                    try await body()
                } catch let error as NBDError {
                    // Whether the request failed or the connection is what the test wants to know.
                    if let failure = connection.failure { throw failure }
                    throw error
                }
            }
            try await complete { try await connection.read(into: data, at: 8192) }
            #expect(data.bytes.allSatisfy { $0 == UInt8(ascii: "Z") })
            if !connection.contexts.isEmpty {
                try await complete {
                    let extents = try await connection.extents(at: 0, count: 65536)
                    #expect(extents.reduce(0) { $0 + $1.length } == 65536)
                }
            }
            try await complete { try await connection.write(data, at: 0) }
            try await complete { try await connection.read(into: data, at: 0) }
            await connection.disconnect()
            await serving.value
        }
    }

    static let options = NBDClientOptions(
        export: "x",
        contexts: [MetaContext.allocation],
        timeout: .seconds(5),
        replyTimeout: .milliseconds(200)
    )

    @Test(arguments: Misbehaviour.allCases.filter { !$0.isAboutTLS && $0.expectation == .fails })
    func theConnectionIsGivenUp(_ fault: Misbehaviour) async throws {
        let error = await #expect(throws: ChannelError.self) { try await Self.use(fault, Self.options) }
        let expected: ChannelError.Code =
            switch fault {
            case .silence: .timedOut
            case .vanishes: .truncated
            default: .protocolViolation
            }
        #expect(error?.code == expected, "\(error?.message ?? "none")")
    }

    @Test(arguments: Misbehaviour.allCases.filter { $0.expectation == .carriesOn })
    func whatIsOnlyUnusualIsTolerated(_ fault: Misbehaviour) async throws {
        try await Self.use(fault, Self.options)
    }

    @Test(arguments: Misbehaviour.allCases.filter { $0.expectation == .requestFails })
    func anErrorOfARequestReachesTheCallerAndNothingElseFails(_ fault: Misbehaviour) async throws {
        let error = await #expect(throws: NBDError.self) { try await Self.use(fault, Self.options) }
        #expect(error?.number == .io)
        #expect(error?.message.unicodeScalars.allSatisfy { $0.value >= 32 } == true, "\(error?.message ?? "")")
    }

    @Test(arguments: Misbehaviour.allCases.filter(\.isAboutTLS))
    func aClientThatRequiresTLSNeverGoesOnWithoutIt(_ fault: Misbehaviour) async throws {
        let pki = try TestPKI()
        let options = NBDClientOptions(
            export: "x",
            credentials: try pki.credentials(.client),
            hostname: "localhost",
            timeout: .seconds(5)
        )
        let error = await #expect(throws: ChannelError.self) { try await Self.use(fault, options) }
        #expect([.protocolViolation, .tls, .truncated].contains(error?.code), "\(error?.message ?? "none")")
    }

    @Test func nothingIsSentThatTheServerDidNotOffer() async throws {
        try await onLoop { loop in
            let (near, far) = MemoryChannel.pair(on: loop)
            let serving = Task(executorPreference: loop) { try? await MisbehavingServer(.infoUnknown).serve(far) }
            let connection = try await NBDConnection.open(over: near, Self.options)
            func check(_ number: NBDError.Number, _ body: () async throws -> Void) async {
                do {
                    try await body()
                    Issue.record("the request was made")
                } catch {
                    #expect((error as? NBDError)?.number == number)
                }
            }
            let small = Payload(IOBuffer(capacity: 64), 0..<64)
            let large = Payload(IOBuffer(capacity: 33 << 20), 0..<(33 << 20))
            await check(.notSupported) { try await connection.trim(at: 0, count: 4096) }
            await check(.notSupported) { try await connection.cache(at: 0, count: 4096) }
            await check(.notSupported) { try await connection.zero(at: 0, count: 4096, fast: true) }
            await check(.notSupported) { try await connection.read(into: small, at: 0, flags: .doNotFragment) }
            await check(.invalid) { try await connection.write(large, at: 0) }
            #expect(connection.failure == nil)
            await connection.disconnect()
            await serving.value
        }
    }

    @Test(arguments: [
        ([0..<10, 10..<20, 20..<30], true), ([20..<30, 0..<10, 10..<20], true), ([0..<10, 5..<15], false),
        ([10..<20, 0..<30], false), ([10..<20, 10..<20], false), ([0..<5, 10..<15, 4..<11], false),
    ])
    func partsOfAReadMayComeInAnyOrderButNotTwice(_ parts: [Range<Int>], _ isGood: Bool) {
        var received = ReceivedParts()
        #expect(parts.allSatisfy { received.insert($0) } == isGood)
        if isGood { #expect(received.count == 30) }
    }
}
