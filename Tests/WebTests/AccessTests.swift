import IO
import TestSupport
import Testing

@testable import Web

/// Tickets, sessions, and by which names this host may be called.
@Suite(.timeLimit(.minutes(1)))
struct AccessTests {
    let now = ContinuousClock.now
    let grant = WebGrant(name: "root", rights: [.view, .act])

    @Test func aTicketIsGoodOnceAndForItsTimeOnly() throws {
        var tickets = Tickets()
        let secret = try tickets.make(grant, life: .seconds(60), now: now)
        #expect(secret.utf8.count == 64)
        #expect(tickets.redeem(secret.uppercased() + "0", now: now) == nil)
        #expect(tickets.redeem(String(repeating: "0", count: 64), now: now) == nil)
        #expect(tickets.redeem(secret, now: now + .seconds(59)) == grant)
        #expect(tickets.redeem(secret, now: now + .seconds(59)) == nil)
        let late = try tickets.make(grant, life: .seconds(60), now: now)
        #expect(tickets.redeem(late, now: now + .seconds(60)) == nil)
        #expect(tickets.redeem(late, now: now) == nil)
    }

    @Test func ticketsAreBoundedInTimeAndNumber() throws {
        var tickets = Tickets()
        for life in [Duration.zero, .seconds(-1), WebLimits.ticketLife + .seconds(1)] {
            #expect(throws: Tickets.Refusal.life) { try tickets.make(grant, life: life, now: now) }
        }
        for _ in 0..<WebLimits.tickets { _ = try tickets.make(grant, life: .seconds(60), now: now) }
        #expect(throws: Tickets.Refusal.many) { try tickets.make(grant, life: .seconds(60), now: now) }
        _ = try tickets.make(grant, life: .seconds(60), now: now + .seconds(61))
    }

    @Test func aSessionIsFoundByItsSecretUntilItEnds() throws {
        var sessions = Sessions()
        let opened = sessions.open(grant, now: now)
        let secret = try #require(opened)
        let session = sessions.find(secret, now: now)
        let found = try #require(session)
        #expect(found.grant == grant)
        #expect(sessions.find(secret, now: now + WebLimits.sessionLife) == nil)
        #expect(sessions.find("x", now: now) == nil && sessions.find("", now: now) == nil)
        let isOpen = sessions.isOpen(found.number, now: now)
        #expect(isOpen)
        sessions.close(found.number)
        let isStillOpen = sessions.isOpen(found.number, now: now)
        #expect(!isStillOpen)
        #expect(sessions.find(secret, now: now) == nil)
    }

    @Test func theSessionThatWasNotUsedForTheLongestTimeGivesWay() throws {
        var sessions = Sessions()
        let secrets = (0..<WebLimits.sessions).compactMap { sessions.open(grant, now: now + .seconds($0)) }
        #expect(secrets.count == WebLimits.sessions)
        let later = now + .seconds(1000)
        _ = sessions.find(secrets[0], now: later)
        _ = sessions.open(grant, now: later)
        #expect(sessions.count == WebLimits.sessions)
        let left = secrets.prefix(3).map { sessions.find($0, now: later) != nil }
        #expect(left == [true, false, true])
    }

    let names = OwnNames(
        hosts: ["localhost", "host-a", "192.0.2.1"],
        proxies: [Authority(host: "vm.example", port: 443)]
    )

    @Test(arguments: [
        ("localhost:10810", true), ("HOST-A:10810", true), ("192.0.2.1:10810", true), ("10.0.0.5:10810", true),
        ("vm.example", true), ("vm.example:443", true), ("vm.example:10810", false), ("localhost", false),
        ("localhost:443", false), ("localhost:10811", false), ("evil.example:10810", false),
        ("10.0.0.6:10810", false), ("host-a.evil.example:10810", false), ("host-a:10810:1", false), ("", false),
        ("host-a:", false), ("host-a:+10810", false), ("host-a:010810", false), ("host-a:99999", false),
        ("root@host-a:10810", false), ("[::1]:10810", false), ("[::1", false), ("[localhost]:10810", false),
        ("host-a:10810/", false), (" host-a:10810", false), ("host-a\u{e4}:10810", false),
    ])
    func aRequestIsForThisHostOrRefused(_ host: String, _ isOurs: Bool) {
        let local = SocketAddress.inet(host: "10.0.0.5", port: 10810)
        #expect(names.accepts(host: host, at: local, .https) == isOurs)
        #expect(!names.accepts(host: host, at: nil, .https) || host.hasPrefix("vm.example"))
    }

    @Test func anAddressOfVersionSixIsOursInBrackets() {
        let local = SocketAddress.inet(host: "fd00::1", port: 443)
        #expect(names.accepts(host: "[fd00::1]", at: local, .https))
        #expect(names.accepts(host: "[FD00::1]:443", at: local, .https))
        #expect(!names.accepts(host: "[fd00::2]", at: local, .https))
    }

    @Test(
        arguments: [
            ("https://host-a:10810", "host-a:10810", true), ("https://host-a", "host-a", true),
            ("https://host-a:443", "host-a", true), ("https://HOST-A:10810", "host-a:10810", true),
            (nil, "host-a:10810", false), ("null", "host-a:10810", false), ("", "host-a:10810", false),
            ("http://host-a:10810", "host-a:10810", false), ("https://host-a", "host-a:10810", false),
            ("https://host-a:10811", "host-a:10810", false), ("https://host-b:10810", "host-a:10810", false),
            ("https://host-a:10810/", "host-a:10810", false),
            ("https://host-a:10810.evil.example", "host-a:10810", false),
            ("https://evil.example", "host-a:10810", false), ("HTTPS://host-a:10810", "host-a:10810", false),
        ] as [(String?, String, Bool)]
    )
    func onlyPagesOfThisHostAsk(_ origin: String?, _ host: String, _ isOurs: Bool) {
        #expect(names.accepts(origin: origin, host: host, .https) == isOurs)
    }

    func request(_ target: String, _ more: String = "") throws -> HTTPRequest {
        try HTTPRequest(HTTPRequestHead(parsing: Array("GET \(target) HTTP/1.1\r\nHost: h\r\n\(more)\r\n".utf8)))
    }

    @Test(
        arguments: [
            ("/", []), ("/?a=b", []), ("/events", ["events"]), ("/page/app.js?v=/../x", ["page", "app.js"]),
            ("/page/", ["page", ""]), ("//", ["", ""]), ("/a%20b%C3%A4", ["a b\u{e4}"]), ("/...", ["..."]),
        ] as [(String, [String])]
    )
    func aPathIsTakenApart(_ target: String, _ path: [String]) throws {
        #expect(try request(target).path == path)
    }

    @Test(arguments: [
        "/..", "/page/../x", "/%2e%2e/x", "/.", "/a/%2E", "/a%2Fb", "/a%5Cb", "/a\\b", "/%00", "/a%0d%0aSet-Cookie:x",
        "/%", "/%2", "/%zz", "/%ff", "/%C3%28", "/%+1",
    ])
    func aPathThatCouldLeadElsewhereIsRefused(_ target: String) {
        let failure = #expect(throws: HTTPFailure.self) { try request(target) }
        #expect(failure?.status == 400)
    }

    @Test(
        arguments: [
            ("Cookie: __Host-crossdock=1\r\n", "1"), ("Cookie: a=b; __Host-crossdock=2; c=d\r\n", "2"),
            ("Cookie: a=b;__Host-crossdock=3=4\r\n", "3=4"), ("Cookie: x__Host-crossdock=1\r\n", nil), ("", nil),
            ("Cookie: __Host-crossdock=1; __Host-crossdock=2\r\n", nil), ("Cookie: __host-crossdock=1\r\n", nil),
        ] as [(String, String?)]
    )
    func theCookieIsFound(_ field: String, _ value: String?) throws {
        #expect(try request("/", field).cookie("__Host-crossdock") == value)
    }

    @Test(arguments: [
        (#"{"action":"cancel","migration":"1-a"}"#, WebAction.cancel(migration: "1-a")),
        (#"{"action":"cancel-evacuation","evacuation":"1-a"}"#, .cancelEvacuation("1-a")),
        (#"{"action":"move","guest":"g","host":"h:1"}"#, .move(guest: "g", host: "h:1")),
        (#"{"action":"cordon"}"#, .cordon(message: "")), (#"{"action":"uncordon","x":1}"#, .uncordon),
    ])
    func anActionIsRead(_ text: String, _ action: WebAction) throws {
        #expect(try WebAction(parsing: Array(text.utf8)) == action)
    }

    @Test(arguments: [
        "", "{}", "[]", #"{"action":"cancel"}"#, #"{"action":"move","guest":"g"}"#, #"{"action":"rm"}"#,
        #"{"action":1}"#,
    ])
    func whatIsNoActionIsRefused(_ text: String) {
        #expect(throws: HTTPFailure.self) { try WebAction(parsing: Array(text.utf8)) }
    }
}
