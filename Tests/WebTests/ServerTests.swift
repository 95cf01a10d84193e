import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import TLS
import TestSupport
import Testing

@testable import Web

/// The web server over real sockets and TLS.
@Suite(.timeLimit(.minutes(3)))
struct ServerTests {
    @Test func thePageNeedsNoRightAndIsKeptByItsTag() async throws {
        let lab = try await WebLab()
        let host = lab.host
        try await lab.client { client in
            let page = try await client.ask("GET", "/", ["Host": host])
            #expect(page.status == 200 && page.text.contains("<html"))
            #expect(page.fields["content-type"] == "text/html; charset=utf-8")
            #expect(page.fields["content-security-policy"]?.hasPrefix("default-src 'none'; script-src 'self'") == true)
            #expect(page.fields["x-content-type-options"] == "nosniff")
            #expect(page.fields["referrer-policy"] == "no-referrer")
            #expect(page.fields["strict-transport-security"] == nil)
            let tag = page.fields["etag"] ?? ""
            #expect(tag.utf8.count == 34)
            let again = try await client.ask("GET", "/", ["Host": host, "If-None-Match": "\"x\", \(tag)"])
            #expect(again.status == 304 && again.text.isEmpty && again.fields["etag"] == tag)
            let head = try await client.ask("HEAD", "/page/index.html", ["Host": host])
            #expect(head.status == 200 && head.fields["content-length"] == "\(page.text.utf8.count)")
            #expect(try await client.ask("GET", "/page/none.js", ["Host": host]).status == 404)
            #expect(try await client.ask("GET", "/page/a/index.html", ["Host": host]).status == 404)
            #expect(try await client.ask("GET", "/none", ["Host": host]).status == 404)
            #expect(try await client.ask("PUT", "/", ["Host": host]).status == 405)
            let last = try await client.ask("GET", "/healthz", ["Host": host, "Connection": "close"])
            #expect(last.text == "ok\n" && last.fields["cache-control"] == "no-store")
            #expect(await client.isEnded())
        }
        await lab.server.stop()
    }

    @Test func aTicketOpensOneSessionThatEndsWhenItIsLeft() async throws {
        let lab = try await WebLab()
        let (host, origin) = (lab.host, lab.origin)
        let secret = try await lab.ticket(.view)
        try await lab.client { client in
            let unknown = try await client.ask("GET", "/session", ["Host": host])
            #expect(unknown.status == 401 && unknown.text.contains("crossdock web ticket"))
            let body = #"{"ticket":"\#(secret)"}"#
            for (field, value) in [("X", "y"), ("Origin", "https://evil.example"), ("Origin", "https://localhost")] {
                let stolen = try await client.ask("POST", "/session", ["Host": host, field: value], body: body)
                #expect(stolen.status == 403, "\(value)")
            }
            let signed = try await client.ask("POST", "/session", ["Host": host, "Origin": origin], body: body)
            #expect(signed.status == 204)
            let cookie = String((signed.fields["set-cookie"] ?? "").prefix { $0 != ";" })
            let reused = try await client.ask("POST", "/session", ["Host": host, "Origin": origin], body: body)
            #expect(reused.status == 403 && reused.text.contains("was used"))
            for body in ["", "{}", "null", #"{"ticket":"x"}"#, #"{"ticket":1}"#] {
                let none = try await client.ask("POST", "/session", ["Host": host, "Origin": origin], body: body)
                #expect([400, 403].contains(none.status), "\(body)")
            }
            let who = try await client.ask("GET", "/session", ["Host": host, "Cookie": cookie])
            #expect(who.status == 200)
            let known = try JSONValue(parsing: Array(who.text.utf8))
            #expect(known["name"] == "operator" && known["rights"] == ["view"] && known["host"] == "host-a")
            #expect(known["guest"] == nil)
            let left = Double(known["expires"]?.integer ?? 0) - Date.now.timeIntervalSince1970
            #expect(left > 43100 && left < 43300)
            let away = try await client.ask("DELETE", "/session", ["Host": host, "Cookie": cookie])
            #expect(away.status == 403)
            let left2 = try await client.ask("DELETE", "/session", ["Host": host, "Cookie": cookie, "Origin": origin])
            #expect(left2.status == 204 && left2.fields["set-cookie"]?.contains("Max-Age=0") == true)
            #expect(try await client.ask("GET", "/session", ["Host": host, "Cookie": cookie]).status == 401)
        }
        await lab.server.stop()
        let lines = lab.log.all
        #expect(!lines.contains { $0.contains(secret) })
        #expect(lines.contains { $0.contains("POST /session from 127.0.0.1") && $0.contains("403") })
    }

    @Test func whoMayLookMayNotActAndATicketForAGuestIsForThatGuest() async throws {
        let lab = try await WebLab()
        let (host, origin, state) = (lab.host, lab.origin, lab.state)
        let (viewer, guest, actor) = (
            try await lab.cookie(.view), try await lab.cookie(guest: "web1"), try await lab.cookie()
        )
        try await lab.client { client in
            func act(_ cookie: String, _ body: String) async throws -> HTTPAnswer {
                try await client.ask(
                    "POST",
                    "/actions",
                    ["Host": host, "Origin": origin, "Cookie": cookie],
                    body: body
                )
            }
            let cordon = #"{"action":"cordon","message":"a new kernel"}"#
            #expect(try await act("__Host-crossdock=0", cordon).status == 401)
            #expect(try await act(viewer, cordon).status == 403)
            #expect(try await act(guest, cordon).status == 403)
            #expect(try await act(guest, #"{"action":"move","guest":"web2","host":"h"}"#).status == 403)
            #expect(try Cordon.read(stateDirectory: state) == nil)
            let forged = try await client.ask(
                "POST",
                "/actions",
                ["Host": host, "Origin": "https://evil.example", "Cookie": actor],
                body: cordon
            )
            #expect(forged.status == 403)
            let done = try await act(actor, cordon)
            #expect(done.status == 202 && done.text.contains("a new kernel"), "\(done.text)")
            #expect(try Cordon.read(stateDirectory: state)?.by == "operator")
            let ready = try await client.ask("GET", "/readyz", ["Host": host])
            #expect(ready.status == 503)
            #expect(try await act(actor, #"{"action":"uncordon"}"#).status == 202)
            #expect(try Cordon.read(stateDirectory: state) == nil)
            #expect(try await act(actor, #"{"action":"rm"}"#).status == 400)
            for body in [
                #"{"action":"cancel","migration":"1-a"}"#, #"{"action":"cancel","migration":"../../x"}"#,
                #"{"action":"cancel-evacuation","evacuation":"1-a"}"#, #"{"action":"move","guest":"web1","host":"h"}"#,
                #"{"action":"move","guest":"../x","host":"h"}"#,
            ] {
                let refused = try await act(actor, body)
                #expect(refused.status == 409 && refused.text.hasPrefix(#"{"error":""#), "\(refused.text)")
            }
        }
        await lab.server.stop()
    }

    @Test func aCertificateLooksIfTheAuthorisationLetsItPass() async throws {
        let objects = ObjectStore()
        try objects.add(ObjectDescription(parsing: "authz-simple,id=lookers,identity=CN=monitor"))
        let lab = try await WebLab(authorization: "lookers", objects: objects)
        let (host, origin) = (lab.host, lab.origin)
        let good = try lab.pki.credentials(.client, directory: lab.pki.issue("monitor", hosts: ["monitor"]))
        try await lab.client(good) { client in
            let who = try await client.ask("GET", "/session", ["Host": host])
            #expect(who.status == 200 && who.text.contains(#""rights":["view"]"#), "\(who.text)")
            #expect(who.text.contains(#""name":"CN=monitor""#) && !who.text.contains("expires"))
            #expect(try await client.ask("GET", "/metrics", ["Host": host]).status == 200)
            let act = try await client.ask(
                "POST",
                "/actions",
                ["Host": host, "Origin": origin],
                body: #"{"action":"cordon"}"#
            )
            #expect(act.status == 403 && act.text.contains("may look here, and not act"))
        }
        let other = try lab.pki.credentials(.client)
        try await lab.client(other) { client in
            let who = try await client.ask("GET", "/session", ["Host": host])
            #expect(who.status == 401 && who.text.contains("may not look"), "\(who.text)")
            #expect(try await client.ask("GET", "/metrics", ["Host": host]).status == 401)
            #expect(try await client.ask("GET", "/", ["Host": host]).status == 200)
        }
        // A certificate of another authority is worse than none.
        let strangers = try TestPKI()
        let path = lab.directory.directory("stranger")
        for name in ["client-cert.pem", "client-key.pem"] {
            let bytes = try DurableFile.read("\(strangers.directory)/\(name)") ?? []
            try DurableFile.write(bytes, to: "\(path)/\(name)")
        }
        let authority = try DurableFile.read("\(lab.pki.directory)/ca-cert.pem") ?? []
        try DurableFile.write(authority, to: "\(path)/ca-cert.pem")
        let stranger = try lab.pki.credentials(.client, directory: path)
        await #expect(throws: (any Error).self) {
            try await lab.client(stranger) { client in _ = try await client.ask("GET", "/", ["Host": host]) }
        }
        await lab.server.stop()
        #expect(lab.log.all.contains { $0.contains("its certificate was rejected") })
    }

    /// Who may do something else here than look, and was not named for that.
    @Test func aCertificateThatNobodyHasNamedIsToldOfTheHostAndOfNoGuest() async throws {
        let lab = try await WebLab { $0.namesLookers = false }
        var record = GuestRecord(
            name: "secret1",
            commandLine: GuestCommandLine(arguments: ["qemu-system-x86_64"], directory: "/")
        )
        record.placement = GuestPlacement()
        let store = GuestStore(stateDirectory: lab.state)
        try store.save(record)
        try DurableFile.makeDirectory(store.directory(of: "broken1"))
        try DurableFile.write(Array("{".utf8), to: "\(store.directory(of: "broken1"))/guest.json")
        let migrations = MigrationStore(stateDirectory: lab.state)
        try DurableFile.makeDirectory(migrations.directory(of: "1700000000-0001"))
        let journal = try Journal(creating: migrations.journal(of: "1700000000-0001"))
        for entry in [JournalRecord.offered(guest: "secret1", destination: "b", order: 1), .released] {
            try journal.append(entry)
        }
        let (host, loop) = (lab.host, EventLoop(name: "lookers"))
        defer { loop.stop() }
        let (address, certificate) = (lab.address, try lab.pki.credentials(.client))
        let (browser, cookie) = (try lab.browserCredentials(), try await lab.cookie(.view))
        let (named, unnamed) = try await loop.run {
            let looker = try await FeedWatcher(address, host, certificate, cookie: "none=none", on: loop)
            let operating = try await FeedWatcher(address, host, browser, cookie: cookie, on: loop)
            return (try await operating.sections(), try await looker.sections())
        }
        let words = unnamed.mapValues(\.text).description
        #expect(!words.contains("secret1") && !words.contains("broken1"), "\(words)")
        #expect(unnamed["host"]?["name"]?.string == "host-a" && unnamed["host"]?["memory"] != nil)
        #expect(named.mapValues(\.text).description.contains("secret1"))
        try await lab.client(certificate) { client in
            #expect(try await client.ask("GET", "/metrics", ["Host": host]).status == 200)
            #expect(try await client.ask("GET", "/healthz", ["Host": host]).status == 200)
            let session = try await client.ask("GET", "/session", ["Host": host])
            #expect(session.status == 200 && session.text.contains(#""guests":false"#), "\(session.text)")
        }
        await lab.server.stop()
    }

    @Test func figuresNameGuestsUnderWayToWhoMayKnowOfThem() async throws {
        let lab = try await WebLab { $0.namesLookers = false }
        let migrations = MigrationStore(stateDirectory: lab.state)
        try DurableFile.makeDirectory(migrations.directory(of: "1700000000-0001"))
        let journal = try Journal(creating: migrations.journal(of: "1700000000-0001"))
        try journal.append(.accepted(guest: "secret1", source: "CN=c", order: 1))
        let (host, cookie, metricsPort) = (lab.host, try await lab.cookie(.view), lab.metricsPort)
        let phase = #"crossdock_migration_phase{guest="secret1""#
        let unnamed = try await lab.client(try lab.pki.credentials(.client)) { client in
            try await client.ask("GET", "/metrics", ["Host": host])
        }
        #expect(unnamed.status == 200 && unnamed.text.contains("crossdock_journal_oldest_open_seconds "))
        #expect(!unnamed.text.contains("secret1"), "\(unnamed.text)")
        let signedIn = try await lab.client { client in
            try await client.ask("GET", "/metrics", ["Host": host, "Cookie": cookie])
        }
        #expect(signedIn.text.contains(phase), "\(signedIn.text)")
        let loop = EventLoop(name: "prometheus")
        defer { loop.stop() }
        let plain = try await loop.run {
            let address = SocketAddress.inet(host: "127.0.0.1", port: metricsPort)
            let client = try await HTTPClient.connect(to: address, nil, on: loop)
            defer { client.close() }
            return try await client.ask("GET", "/metrics", ["Host": "127.0.0.1:\(metricsPort)"])
        }
        #expect(plain.text.contains(phase), "\(plain.text)")
        await lab.server.stop()

        let objects = ObjectStore()
        try objects.add(ObjectDescription(parsing: "authz-simple,id=lookers,identity=CN=monitor"))
        let naming = try await WebLab(authorization: "lookers", objects: objects)
        let store = MigrationStore(stateDirectory: naming.state)
        try DurableFile.makeDirectory(store.directory(of: "1700000000-0002"))
        let other = try Journal(creating: store.journal(of: "1700000000-0002"))
        try other.append(.accepted(guest: "secret1", source: "CN=c", order: 1))
        let name = naming.host
        let monitor = try naming.pki.credentials(
            .client,
            directory: naming.pki.issue("monitor", hosts: ["monitor"])
        )
        let named = try await naming.client(monitor) { client in
            try await client.ask("GET", "/metrics", ["Host": name])
        }
        #expect(named.status == 200 && named.text.contains(phase), "\(named.text)")
        await naming.server.stop()
    }

    @Test func otherNamesThanItsOwnAreNotThisHost() async throws {
        let lab = try await WebLab { $0.names = ["vm.example", "vm.example:8443"] }
        let port = lab.port
        try await lab.client { client in
            for (host, status) in [
                ("localhost:\(port)", 200), ("127.0.0.1:\(port)", 200), ("vm.example:8443", 200),
                ("localhost", 403), ("localhost:1", 403), ("evil.example:\(port)", 403), ("vm.example:1", 403),
                ("localhost.evil.example:\(port)", 403),
            ] {
                let answer = try await client.ask("GET", "/healthz", ["Host": host])
                #expect(answer.status == status, "\(host)")
            }
        }
        let plain = SocketAddress.inet(host: "127.0.0.1", port: lab.metricsPort)
        try await onLoop { loop in
            let client = try await HTTPClient.connect(to: plain, nil, on: loop)
            defer { client.close() }
            let host = "127.0.0.1:\(plain.port ?? 0)"
            let figures = try await client.ask("GET", "/metrics", ["Host": host])
            #expect(figures.status == 200 && figures.text.contains("crossdock_build_info{version=\"1.2.3\""))
            #expect(figures.fields["content-type"] == "text/plain; version=0.0.4; charset=utf-8")
            #expect(try await client.ask("GET", "/metrics", ["Host": "evil.example"]).status == 403)
            #expect(try await client.ask("GET", "/healthz", ["Host": host]).text == "ok\n")
            for path in ["/", "/session", "/events", "/page/index.html"] {
                #expect(try await client.ask("GET", path, ["Host": host]).status == 404, "\(path)")
            }
            #expect(try await client.ask("POST", "/actions", ["Host": host], body: "{}").status == 405)
        }
        await lab.server.stop()
    }

    @Test func aPortWithoutTLSIsOnLoopbackOnlyAndAPageWantsCertificates() async throws {
        let error = await #expect(throws: MigrationError.self) {
            _ = try await WebLab { $0.metrics = .inet(host: "0.0.0.0", port: 0) }
        }
        #expect(error?.message.contains("is not an address of loopback") == true)
        await #expect(throws: CredentialError.self) { _ = try await WebLab { $0.credentials = nil } }
    }

    @Test func whoMayOpenTheSocketMayAct() async throws {
        let lab = try await WebLab(unix: true)
        let path = lab.directory.file("web.sock")
        var status = stat()
        #expect(stat(path, &status) == 0 && status.st_mode & 0o777 == 0o600)
        let state = lab.state
        try await onLoop { loop in
            let client = try await HTTPClient.connect(to: .unix(path: path), nil, on: loop)
            defer { client.close() }
            let who = try await client.ask("GET", "/session", ["Host": "localhost"])
            #expect(who.status == 200 && who.text.contains(#""rights":["view","act"]"#), "\(who.text)")
            // A browser may be led here by a forwarded port, and by a page of somebody else.
            for (host, origin) in [
                ("localhost:8080", "https://evil.example"), ("localhost:8080", "http://localhost:8081"),
                ("localhost:8080", "null"), ("evil.example", "http://evil.example"),
            ] {
                let fields: KeyValuePairs = ["Host": host, "Origin": origin]
                let forged = try await client.ask("POST", "/actions", fields, body: #"{"action":"cordon"}"#)
                #expect(forged.status == 403, "\(host) \(origin)")
            }
            let rebound = try await client.ask("GET", "/metrics", ["Host": "evil.example"])
            #expect(rebound.status == 403)
            let own: KeyValuePairs = ["Host": "localhost:8080", "Origin": "http://localhost:8080"]
            #expect(try await client.ask("POST", "/actions", own, body: #"{"action":"uncordon"}"#).status == 202)
            let done = try await client.ask("POST", "/actions", ["Host": "localhost"], body: #"{"action":"cordon"}"#)
            #expect(done.status == 202)
            #expect(try Cordon.read(stateDirectory: state) != nil)
        }
        await #expect(throws: MigrationError.self) { try await lab.ticket() }
        await lab.server.stop()
    }

    @Test func silentConnectionsCrowdOutThemselves() async throws {
        let lab = try await WebLab()
        let (address, host) = (lab.address, lab.host)
        let browser = try lab.browserCredentials()
        let cookie = try await lab.cookie()
        try await onLoop { loop in
            // One that has shown its right stays, whoever comes.
            let proven = try await HTTPClient.connect(to: address, browser, on: loop)
            #expect(try await proven.ask("GET", "/session", ["Host": host, "Cookie": cookie]).status == 200)
            var silent: [SocketChannel] = []
            for _ in 0..<(WebLimits.unprovenConnections + 40) {
                silent.append(try await SocketChannel.connect(to: address, on: loop))
            }
            let other = try await HTTPClient.connect(to: address, browser, on: loop)
            #expect(try await other.ask("GET", "/healthz", ["Host": host]).status == 200)
            // The first ones were ended.
            #expect(await HTTPClient(over: silent[0]).isEnded())
            #expect(try await proven.ask("GET", "/session", ["Host": host, "Cookie": cookie]).status == 200)
            for channel in silent { channel.close() }
            proven.close()
            other.close()
        }
        await lab.server.stop()
        let lines = lab.log.all.filter { $0.contains("dropped") }
        #expect(!lines.isEmpty && lines.count <= 20)
    }

    @Test func garbageIsAnsweredAndEnded() async throws {
        let lab = try await WebLab()
        let host = lab.host
        for text in [
            "GET / HTTP/1.1\r\nHost: \(host)\r\nHost: x\r\n\r\n", "\u{16}\u{3}\u{1}\r\n\r\n",
            "GET / HTTP/1.1\nHost: h\n\n\r\n\r\n",
            "POST /session HTTP/1.1\r\nHost: \(host)\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "GET /\(String(repeating: "a", count: 20000)) HTTP/1.1\r\nHost: h\r\n\r\n",
        ] {
            try await lab.client { client in
                try await client.send(text)
                let answer = try await client.answer()
                #expect([400, 431, 501].contains(answer.status) && answer.fields["connection"] == "close")
                #expect(await client.isEnded())
            }
        }
        await lab.server.stop()
    }
}
