import Fleet
import Testing

/// Tokens as they are copied from one terminal to another.
struct JoinTokenTests {
    private static func token() -> JoinToken {
        JoinToken(
            authority: "SHA256:" + String(repeating: "0123456789abcdef", count: 4),
            ends: 1_900_000_000,
            port: 10812,
            waiter: "host-a",
            waiterAddresses: ["192.0.2.1", "2001:db8::1"],
            host: "host-b",
            addresses: ["192.0.2.2"]
        )
    }

    @Test func aTokenIsReadAsItWasMade() throws {
        let token = Self.token()
        let text = try token.text
        #expect(try JoinToken(parsing: text) == token)
        // A terminal may break it.
        #expect(try JoinToken(parsing: "  " + text.prefix(60) + "\n" + text.dropFirst(60) + "\r\n") == token)
        #expect(text.utf8.allSatisfy { $0 > 32 && $0 < 127 && !"'\"\\$`".utf8.contains($0) })
    }

    @Test func everySecretIsAnother() { #expect(Set((0..<100).map { _ in JoinToken.makeSecret() }).count == 100) }

    @Test func aCharacterThatIsLostOrMistypedIsFound() throws {
        let text = Array(try Self.token().text)
        for index in text.indices {
            var lost = text
            lost.remove(at: index)
            #expect(throws: FleetError.self) { try JoinToken(parsing: String(lost)) }
            var wrong = text
            wrong[index] = wrong[index] == "A" ? "B" : "A"
            #expect(throws: FleetError.self) { try JoinToken(parsing: String(wrong)) }
        }
    }

    @Test(arguments: [
        "", "host-b", "crossdock-join-1:", "crossdock-join-1:AAAA", "crossdock-join-2:AAAA", "crossdock-join-1:\u{1b}",
    ])
    func whatIsNoTokenIsSaid(_ text: String) {
        #expect(throws: FleetError.self) { try JoinToken(parsing: text) }
    }
}

/// How often a token may be tried.
struct TryLimiterTests {
    private static let start = ContinuousClock.now

    private static func admitted(_ limiter: inout TryLimiter, _ address: String, tries: Int, at seconds: Double) -> Int
    {
        (0..<tries).count { _ in limiter.admits(address, at: start + .seconds(seconds)) }
    }

    @Test func someTriesAreFreeAndThenThereIsOneInAWhile() {
        var limiter = TryLimiter(burst: 3, pause: .seconds(2))
        let count1 = Self.admitted(&limiter, "a", tries: 10, at: 0)
        #expect(count1 == 3)
        let count2 = Self.admitted(&limiter, "a", tries: 10, at: 1)
        #expect(count2 == 0)
        let count3 = Self.admitted(&limiter, "a", tries: 10, at: 2)
        #expect(count3 == 1)
        let count4 = Self.admitted(&limiter, "a", tries: 10, at: 100)
        #expect(count4 == 3)
    }

    @Test func whoTriesForEverKeepsNoOtherOneOut() {
        var limiter = TryLimiter(burst: 3, pause: .seconds(2))
        let count5 = Self.admitted(&limiter, "a", tries: 1000, at: 0)
        #expect(count5 == 3)
        let count6 = Self.admitted(&limiter, "b", tries: 1, at: 0)
        #expect(count6 == 1)
    }

    @Test func manyAddressesShareOneAccountAndAreForgottenInTime() {
        var limiter = TryLimiter(burst: 1, pause: .seconds(2), capacity: 10)
        let admitted = (0..<1000).count { limiter.admits("\($0)", at: Self.start) }
        #expect(admitted == 11)
        let later = limiter.admits("new", at: Self.start + .seconds(10))
        #expect(later)
    }
}
