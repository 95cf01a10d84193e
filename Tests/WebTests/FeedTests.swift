import Emulator
import Glibc
import IO
import Migration
import TLS
import TestSupport
import Testing

@testable import Web

/// What viewers are told of a state directory.
@Suite(.timeLimit(.minutes(3)))
struct FeedTests {
    func watch(_ lab: WebLab, _ cookie: String, on loop: EventLoop) async throws -> FeedWatcher {
        try await FeedWatcher(lab.address, lab.host, lab.browserCredentials(), cookie: cookie, on: loop)
    }

    /// Writes a migration's journal.
    func journal(_ id: String, _ records: [JournalRecord], in state: String) throws -> MigrationFiles {
        let files = MigrationStore(stateDirectory: state).files(of: id)
        try DurableFile.makeDirectory(files.directory)
        let journal = try Journal(creating: files.journal)
        for record in records { try journal.append(record) }
        return files
    }

    func guest(_ name: String, in state: String, labels: [String: String] = [:]) throws {
        var record = GuestRecord(
            name: name,
            commandLine: GuestCommandLine(
                arguments: ["qemu-system-x86_64", "-m", "512", "-smp", "2"],
                directory: "/"
            )
        )
        var placement = GuestPlacement()
        placement.labels = labels
        record.placement = placement
        try GuestStore(stateDirectory: state).save(record)
    }

    @Test func everySectionComesOnceAndThenWhatHasChanged() async throws {
        let lab = try await WebLab()
        let state = lab.state
        try guest("web1", in: state, labels: ["env": "prod"])
        try guest("gone", in: state)
        _ = try journal(
            "100-aa",
            [.offered(guest: "gone", destination: "b", order: 0), .released, .confirmed],
            in: state
        )
        _ = try journal("200-bb", [.offered(guest: "web1", destination: "b", order: 1), .released], in: state)
        _ = try journal("300-cc", [.offered(guest: "web2", destination: "b", order: 2)], in: state)
        var report = MigrationReport(migration: "100-aa", guest: "gone", destination: "b")
        (report.outcome, report.totalMS, report.blackoutMS) = (.migrated, 4000, 120)
        let store = MigrationStore(stateDirectory: state)
        try DurableFile.write(Array(report.json.utf8), to: store.files(of: "100-aa").report)
        try DurableFile.makeDirectory("\(state)/guests/broken")
        try DurableFile.write(Array("{".utf8), to: "\(state)/guests/broken/guest.json")
        let cookie = try await lab.cookie(.view)
        let (host, origin, written) = (lab.host, lab.origin, report.json)
        try await onLoop { loop in
            let watcher = try await self.watch(lab, cookie, on: loop)
            let first = try await watcher.sections()
            #expect(first["host"]?["name"] == "host-a" && first["host"]?["memory"]?["reserved"] == 20)
            #expect(first["host"]?["disk"]?["free"] == 0 && first["host"]?["disk"]?["directory"]?.string != nil)
            #expect(first["host"]?["protocol"] == 1 && first["evacuation"] == .null && first["moves"] == [])
            let guests = first["guests"]?.array ?? []
            #expect(guests.map { $0["name"]?.string } == ["broken", "web1"])
            #expect(guests[0]["state"] == "damaged" && guests[1]["state"] == "released")
            #expect(guests[1]["labels"] == ["env": "prod"] && guests[1]["memory"] == .integer(512 << 20))
            #expect(guests[1]["processors"] == 2 && guests[1]["movable"] == false)
            let history = first["history"]?.array ?? []
            #expect(history.map { $0["migration"]?.string } == ["300-cc", "200-bb", "100-aa"])
            #expect(history.map { $0["outcome"]?.string } == ["interrupted", "undecided", "migrated"])
            #expect(history[2]["pause_ms"] == 120 && history[2]["took_ms"] == 4000 && history[2]["has_report"] == true)
            #expect(history[2]["began"] == 100 && history[0]["has_report"] == false)
            let trouble = first["trouble"]?.array ?? []
            func named(_ kind: String) -> JSONValue? { trouble.first { $0["kind"]?.string == kind } }
            #expect(named("undecided")?["command"] == "crossdock recover 200-bb")
            #expect(named("interrupted")?["command"] == "crossdock recover 300-cc")
            #expect(named("unreadable")?["guest"] == "broken")

            try Cordon(by: "me", message: "later").write(stateDirectory: state)
            let cordoned = try await watcher.section("host") { $0["cordon"]?.string != nil }
            #expect(cordoned["cordon"]?.string?.contains("later") == true)
            try self.guest("web3", in: state)
            _ = try await watcher.section("guests") { $0.array.contains { $0["name"] == "web3" } }

            // A second viewer has everything anew; one whose session ends is ended.
            let other = try await self.watch(lab, cookie, on: loop)
            #expect(try await other.sections()["guests"]?.array.count == 3)
            try await lab.client { client in
                let reports = try await client.ask("GET", "/reports/100-aa", ["Host": host, "Cookie": cookie])
                #expect(reports.status == 200 && reports.text == written)
                for path in ["/reports/200-bb", "/reports/x", "/reports/..%2f..%2fx"] {
                    let absent = try await client.ask("GET", path, ["Host": host, "Cookie": cookie])
                    #expect([400, 404].contains(absent.status), "\(path)")
                    if absent.status == 400 { return }
                }
            }
            try await lab.client { client in
                let fields: KeyValuePairs = ["Host": host, "Cookie": cookie, "Origin": origin]
                let left = try await client.ask("DELETE", "/session", fields)
                #expect(left.status == 204)
            }
            await #expect(throws: (any Error).self) { while true { _ = try await watcher.next() } }
        }
        await lab.server.stop()
    }

    @Test func whoMayKnowOfOneGuestLearnsOfNoOther() async throws {
        let lab = try await WebLab()
        let state = lab.state
        try guest("web1", in: state)
        try guest("secret", in: state)
        _ = try journal("100-aa", [.offered(guest: "secret", destination: "b", order: 0)], in: state)
        let report = MigrationReport(migration: "100-aa", guest: "secret", destination: "b")
        try DurableFile.write(
            Array(report.json.utf8),
            to: MigrationStore(stateDirectory: state).files(of: "100-aa").report
        )
        let cookie = try await lab.cookie(.view, guest: "web1")
        let host = lab.host
        try await onLoop { loop in
            let watcher = try await self.watch(lab, cookie, on: loop)
            var text = ""
            for _ in 0..<6 { text += try await watcher.next().text }
            #expect(text.contains("web1") && !text.contains("secret") && !text.contains("memory\":{"), "\(text)")
            try await lab.client { client in
                let fields: KeyValuePairs = ["Host": host, "Cookie": cookie]
                let report = try await client.ask("GET", "/reports/100-aa", fields)
                let figures = try await client.ask("GET", "/metrics", fields)
                #expect(report.status == 404 && figures.status == 403)
            }
        }
        await lab.server.stop()
    }

    @Test func theFeedIsForOwnPagesWithARight() async throws {
        let lab = try await WebLab()
        let (host, origin, cookie) = (lab.host, lab.origin, try await lab.cookie(.view))
        let key = WebSocketHandshake.newKey()
        try await lab.client { client in
            func open(_ origin: String, _ cookie: String) async throws -> Int {
                try await client.ask(
                    "GET",
                    "/events",
                    [
                        "Host": host, "Origin": origin, "Cookie": cookie, "Upgrade": "websocket",
                        "Connection": "Upgrade", "Sec-WebSocket-Key": key, "Sec-WebSocket-Version": "13",
                    ]
                ).status
            }
            var found: [Int] = []
            for (from, cookie) in [
                (origin, "x=y"), ("https://evil.example", cookie), ("null", cookie), (origin, cookie),
            ] {
                found.append(try await open(from, cookie))
            }
            #expect(found == [401, 403, 403, 101])
        }
        await lab.server.stop()
    }

    @Test func oneSessionHasSoManyViewersAndNoMore() async throws {
        let lab = try await WebLab()
        let (cookie, other) = (try await lab.cookie(.view), try await lab.cookie(.view))
        try await onLoop { loop in
            var viewers: [FeedWatcher] = []
            for _ in 0..<WebLimits.viewersOfVisitor {
                viewers.append(try await self.watch(lab, cookie, on: loop))
                _ = try await viewers.last?.sections()
            }
            await #expect(throws: (any Error).self) { _ = try await self.watch(lab, cookie, on: loop) }
            _ = try await self.watch(lab, other, on: loop).sections()
            // All of them see what happens; one that goes makes room.
            try self.guest("web1", in: lab.state)
            for viewer in viewers { _ = try await viewer.section("guests") { !$0.array.isEmpty } }
            viewers.removeLast().close()
            try await eventually("there is room") {
                guard let next = try? await self.watch(lab, cookie, on: loop) else { return false }
                _ = try await next.sections()
                return true
            }
        }
        await lab.server.stop()
    }

    @Test func eventsAreReadOnAndNoneComesTwice() throws {
        let directory = try TestDirectory()
        let store = MigrationStore(stateDirectory: directory.path)
        let files = try journal("100-aa", [.offered(guest: "g", destination: "b", order: 0)], in: directory.path)
        func write(_ events: [String], to path: String, appending: Bool = true) throws {
            let old = appending ? try DurableFile.read(path) ?? [] : []
            let lines = events.map { name -> [UInt8] in
                var event = MigrationEvent(name, migration: "100-aa", guest: "g", ms: 1)
                event.message = "\"quoted\""
                return Array(event.line.utf8)
            }
            try DurableFile.write(old + lines.flatMap { $0 }, to: path)
        }
        func names(_ lines: [EventTails.Line]) throws -> [String] {
            try lines.map { line in
                let value = try JSONValue(parsing: line.bytes)
                #expect(value["migration"] == "100-aa" && value["guest"] == "g" && line.bytes.last == 10)
                return value["event"]?["event"]?.string ?? ""
            }
        }
        try write(["phase", "warning"], to: files.events)
        var tails = EventTails()
        // What was there is not told.
        #expect(try names(tails.look(["100-aa"], underWay: ["100-aa"], store)) == [])
        try write(["phase"], to: files.events)
        try write(["progress"], to: files.progress, appending: false)
        #expect(try names(tails.look(["100-aa"], underWay: ["100-aa"], store)) == ["phase", "progress"])
        #expect(try names(tails.look(["100-aa"], underWay: ["100-aa"], store)) == [])
        // Half a line waits for its end, and what is written before the end of the agent is read after it.
        let whole = try DurableFile.read(files.events) ?? []
        try DurableFile.write(whole + Array("{\"event\":\"fin".utf8), to: files.events)
        #expect(try names(tails.look(["100-aa"], underWay: ["100-aa"], store)) == [])
        try DurableFile.write(whole, to: files.events)
        try write(["finished"], to: files.events)
        #expect(try names(tails.look(["100-aa"], underWay: [], store)) == ["finished"])
        #expect(try names(tails.look(["100-aa"], underWay: [], store)) == [])
        // One that has begun since is told from its beginning.
        let other = store.files(of: "200-bb")
        try DurableFile.makeDirectory(other.directory)
        try write(["phase", "phase"], to: other.events)
        #expect(try names(tails.look(["100-aa", "200-bb"], underWay: ["200-bb"], store)) == ["phase", "phase"])
    }

    @Test func theMoveThatHasLedAGuestAwayHasTheConsolesThatArePassedOn() throws {
        let directory = try TestDirectory()
        let state = directory.path
        /// A guest that has left twice, the second time for where it is now.
        func left(_ name: String, _ number: Int, grant: ConsoleGrant?, serial: Bool, display: Bool) throws {
            let ids = ["\(number)00-aa", "\(number)50-aa"]
            for (order, id) in ids.enumerated() {
                _ = try journal(
                    id,
                    [.offered(guest: name, destination: "b", order: order), .released, .confirmed],
                    in: state
                )
            }
            var record = GuestRecord(
                name: name,
                commandLine: GuestCommandLine(
                    arguments: ["qemu-system-x86_64"] + (display ? ["-vnc", "unix:/run/vnc.sock"] : []),
                    directory: "/"
                )
            )
            record.placement = GuestPlacement()
            if serial { record.placement?.console = "0" }
            record.released = .init(migration: ids[1], destination: "b")
            try GuestStore(stateDirectory: state).save(record)
            guard let grant else { return }
            try ConsoleDeparture(guest: name, host: "b", port: 1, grant: grant).write(stateDirectory: state)
        }
        try left("both", 1, grant: ConsoleGrant(), serial: true, display: true)
        try left("screen", 2, grant: ConsoleGrant(), serial: false, display: true)
        try left("none", 3, grant: ConsoleGrant(), serial: false, display: false)
        try left("lost", 4, grant: nil, serial: true, display: true)
        var host = WebHost(
            name: "a",
            version: "1",
            address: "",
            stateDirectory: state,
            imageDirectory: state,
            credentials: nil
        )
        func shown(_ reader: inout StateReader) -> [String: ConsoleKinds] {
            let history = reader.look().sections.history
            return Dictionary(
                history.compactMap { entry in entry.console.map { (entry.migration, $0) } },
                uniquingKeysWith: { first, _ in first }
            )
        }
        var alone = StateReader(host)
        #expect(shown(&alone) == [:])
        host.openConsole = { _, _, _ in throw TestFailure("nobody asks") }
        var reader = StateReader(host)
        let both = ConsoleKinds(serial: true, vnc: true)
        #expect(shown(&reader) == ["150-aa": both, "250-aa": ConsoleKinds(serial: false, vnc: true)])
        // What is forgotten leads nowhere.
        ConsoleDeparture.remove("screen", stateDirectory: state)
        #expect(shown(&reader) == ["150-aa": both])
    }

    @Test func fiveHundredGuestsAndMigrationsAreReadOnce() throws {
        let directory = try TestDirectory()
        for index in 0..<500 {
            try guest("g\(index)", in: directory.path)
            let id = "\(1000 + index)-aa"
            let end: JournalRecord = .rolledBack(reason: "no")
            _ = try journal(
                id,
                [.offered(guest: "g\(index)", destination: "b", order: index), end],
                in: directory.path
            )
        }
        let host = WebHost(
            name: "a",
            version: "1",
            address: "",
            stateDirectory: directory.path,
            imageDirectory: directory.path,
            credentials: nil
        )
        var reader = StateReader(host)
        let first = ContinuousClock().measure { _ = reader.look() }
        var look = StateReader.Look()
        let again = ContinuousClock().measure { look = reader.look() }
        #expect(look.sections.guests.count == 500 && look.sections.history.count == 500)
        // A guess at what a slow machine needs; reading all again takes several times as long.
        #expect(again < first / 2, "\(first), then \(again)")
        var writer = SectionWriter()
        #expect(writer.write(look.sections, for: [.everybody])[.everybody]?.count == 6)
        #expect(writer.write(look.sections, for: [.everybody])[.everybody]?.isEmpty == true)
        print("500 guests and migrations: \(first), then \(again)")
    }
}
