import Emulator
import Glibc
import IO
import Migration
import TLS
import TestSupport
import Testing

/// The page of two agents between which a guest moves.
@Suite(.serialized, .timeLimit(.minutes(15)))
struct WebEndToEnd {
    /// The page of one host's agent.
    struct Page: Sendable {
        let lab: Lab
        let side: String
        let port: UInt16
        let metricsPort: UInt16
        let browser: X509Credentials

        init(_ lab: Lab, _ side: String) async throws {
            (self.lab, self.side) = (lab, side)
            try await lab.startDestination(side, more: ["--web", "127.0.0.1:0", "--metrics", "127.0.0.1:0"])
            let output = lab.destinationOutput(side)
            func port(_ marker: String) throws -> UInt16 {
                guard let range = output.firstRange(of: marker) else { throw TestFailure("No \(marker): \(output)") }
                return UInt16(output[range.upperBound...].prefix { $0.isNumber }) ?? 0
            }
            self.port = try port("page at https://127.0.0.1:")
            metricsPort = try port("figures at http://127.0.0.1:")
            let path = lab.directory.directory("browser-\(side)")
            let authority = try DurableFile.read("\(lab.pki.directory)/ca-cert.pem") ?? []
            try DurableFile.write(authority, to: "\(path)/ca-cert.pem")
            browser = try X509Credentials(id: "browser", directory: path, endpoint: .client)
        }

        var host: String { "localhost:\(port)" }

        /// Runs `body` with a browser's connection.
        func client<T: Sendable>(_ body: @escaping @Sendable (HTTPClient) async throws -> T) async throws -> T {
            let (port, browser, loop) = (port, browser, lab.loop)
            return try await loop.run {
                let client = try await HTTPClient.connect(
                    to: .inet(host: "127.0.0.1", port: port),
                    browser,
                    on: loop
                )
                defer { client.close() }
                return try await body(client)
            }
        }

        /// Signs in with a ticket of the command line.
        func signIn(_ options: [String] = []) async throws -> String {
            let made = try await lab.crossdock(["web", "ticket", "--state-dir", lab.state(side)] + options)
            guard made.code == 0, let mark = made.output.firstRange(of: "/#t=") else { throw TestFailure(made.all) }
            #expect(made.output.hasPrefix("https://127.0.0.1:\(port)/"))
            let secret = made.output[mark.upperBound...].prefix { $0.isHexDigit }
            let host = host
            return try await client { client in
                let answer = try await client.ask(
                    "POST",
                    "/session",
                    ["Host": host, "Origin": "https://\(host)"],
                    body: #"{"ticket":"\#(secret)"}"#
                )
                #expect(answer.status == 204, "\(answer.text)")
                return String((answer.fields["set-cookie"] ?? "").prefix { $0 != ";" })
            }
        }

        func act(_ cookie: String, _ body: String) async throws -> HTTPAnswer {
            let host = host
            return try await client {
                try await $0.ask(
                    "POST",
                    "/actions",
                    ["Host": host, "Origin": "https://\(host)", "Cookie": cookie],
                    body: body
                )
            }
        }

        func figures() async throws -> String {
            let (port, loop) = (metricsPort, lab.loop)
            return try await loop.run {
                let client = try await HTTPClient.connect(to: .inet(host: "127.0.0.1", port: port), nil, on: loop)
                defer { client.close() }
                return try await client.ask("GET", "/metrics", ["Host": "127.0.0.1:\(port)"]).text
            }
        }

        /// Runs `body` with a viewer that has its first sections.
        func watch<T: Sendable>(
            _ cookie: String,
            _ body: @escaping @Sendable (FeedWatcher, [String: JSONValue]) async throws -> T
        ) async throws -> T {
            let (port, host, browser, loop) = (port, host, browser, lab.loop)
            return try await loop.run {
                let watcher = try await FeedWatcher(
                    .inet(host: "127.0.0.1", port: port),
                    host,
                    browser,
                    cookie: cookie,
                    on: loop
                )
                defer { watcher.close() }
                return try await body(watcher, try await watcher.sections())
            }
        }
    }

    @Test func aMoveThatThePageAsksForIsSeenFromBothEnds() async throws {
        let lab = try Lab()
        let (a, b) = (try await Page(lab, "a"), try await Page(lab, "b"))
        // Enough to be looked at more than once.
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 1024, data: 400)])
        let (here, there) = (try await a.signIn(), try await b.signIn(["--view-only"]))
        let before = try await a.figures()
        #expect(before.contains("crossdock_guests{state=\"running\"} 1\n"), "\(before)")
        #expect(!before.contains("crossdock_migrations_total{"))
        #expect(try await b.act(there, #"{"action":"cordon"}"#).status == 403)

        let target = "localhost:\(lab.controlPort(of: "b"))"
        let arrival = Task {
            try await b.watch(there) { watcher, first in
                #expect(first["guests"] == [])
                let moves = try await watcher.section("moves") { !$0.array.isEmpty }
                #expect(moves.array.first?["direction"] == "in" && moves.array.first?["can_cancel"] == false)
                return try await watcher.section("guests") { guests in
                    guests.array.contains { $0["name"] == "web1" && $0["state"] == "running" }
                }
            }
        }
        let events = try await a.watch(here) { watcher, first in
            #expect(first["guests"]?.array.first?["name"] == "web1")
            #expect(first["history"] == [] && first["moves"] == [])
            let asked = try await a.act(here, #"{"action":"move","guest":"web1","host":"\#(target)"}"#)
            #expect(asked.status == 202 && asked.text.contains("begins to move"), "\(asked.text)")
            // Within a look the guests come before the history, and the events before both. The agent has a last word when its guest has
            // moved already.
            var lines = try await watcher.lines { $0["section"] == "history" && $0["value"] != [] }
            func isLast(_ line: JSONValue) -> Bool { line["event"]?["event"] == "finished" }
            if !lines.contains(where: isLast) { lines += try await watcher.lines(until: isLast) }
            func values(_ name: String) -> [JSONValue] {
                lines.filter { $0["section"]?.string == name }.compactMap { $0["value"] }
            }
            let move = values("moves").first { !$0.array.isEmpty }?.array.first
            #expect(move?["guest"] == "web1" && move?["direction"] == "out" && move?["peer"] == "localhost")
            #expect(values("moves").contains { $0.array.first?["bytes_per_second"] != nil })
            #expect(values("guests").last == [])
            let row = values("history").first { !$0.array.isEmpty }?.array.first
            #expect(row?["outcome"] == "migrated" && row?["role"] == "source")
            return lines.compactMap { $0["event"] }
        }
        let phases = events.filter { $0["event"] == "phase" }.compactMap { $0["phase"]?.string }
        #expect(phases == ["check", "disks", "verify", "memory", "switchover", "release", "done"])
        #expect(events.last?["event"] == "finished" && events.last?["report"]?["outcome"] == "migrated")
        #expect(events.allSatisfy { $0["guest"] == "web1" })
        _ = try await arrival.value

        let id = events.last?["migration"]?.string ?? ""
        let host = a.host
        let report = try await a.client {
            try await $0.ask("GET", "/reports/\(id)", ["Host": host, "Cookie": here])
        }
        #expect(report.status == 200 && report.text.contains("\"outcome\" : \"migrated\""))
        let after = try await a.figures()
        #expect(after.contains(#"crossdock_migrations_total{direction="out",outcome="done",code="0"} 1"#), "\(after)")
        #expect(after.contains("crossdock_blackout_seconds_count 1\n") && !after.contains("crossdock_guests{"))
        let arrived = try await b.figures()
        #expect(
            arrived.contains(#"crossdock_migrations_total{direction="in",outcome="done",code="0"} 1"#),
            "\(arrived)"
        )
        func figure(_ name: String) -> Int {
            guard let range = arrived.firstRange(of: "\n\(name) ") else { return -1 }
            return Int(arrived[range.upperBound...].prefix { $0.isNumber }) ?? -1
        }
        // The 400 MiB of data in the disk, and what the guest has in its memory.
        #expect(
            figure(#"crossdock_transferred_bytes_total{channel="disk",direction="in"}"#) >= 400 << 20,
            "\(arrived)"
        )
        #expect(
            figure(#"crossdock_transferred_bytes_total{channel="memory",direction="in"}"#) > 1 << 16,
            "\(arrived)"
        )
        #expect(figure(#"crossdock_tls_handshakes_total{result="accepted"}"#) > 2, "\(arrived)")
        #expect(figure("crossdock_export_connections") == 0, "\(arrived)")
        let status = try await lab.crossdock(["status", "--metrics", "--state-dir", lab.state("a")])
        #expect(status.output.contains("crossdock_blackout_seconds_count 1\n"), "\(status.all)")
    }

    @Test func aMoveIsCancelledAndTheGuestStays() async throws {
        let lab = try Lab()
        let a = try await Page(lab, "a")
        try await lab.startDestination("b")
        try await lab.startIdleGuest(disks: [try await lab.makeImage("disk.raw", megabytes: 64, data: 30)])
        let (cookie, viewer) = (try await a.signIn(), try await a.signIn(["--view-only"]))
        let move = try lab.beginMigration(more: ["--bandwidth", "1M"])
        let moves = try await a.watch(viewer) { watcher, _ in
            try await watcher.section("moves") { moves in
                moves.array.contains {
                    $0["phase"] == "disks" && $0["can_cancel"] == true && $0["bytes_per_second"] != nil
                }
            }
        }
        let id = moves.array.first?["migration"]?.string ?? ""
        let running = try await a.figures()
        #expect(running.contains(#"crossdock_migration_phase{guest="web1""#), "\(running)")
        #expect(running.contains(#"crossdock_migration_progress_ratio{guest="web1"}"#))
        let body = #"{"action":"cancel","migration":"\#(id)"}"#
        #expect(try await a.act(viewer, body).status == 403)
        let done = try await a.act(cookie, body)
        #expect(done.status == 202, "\(done.text)")
        #expect(try await move.finish(seconds: 60).code == 18)
        #expect(try await lab.monitor("a") { try await $0.status() } == "running")
        #expect(try await a.act(cookie, body).status == 409)
        let after = try await a.figures()
        #expect(
            after.contains(#"crossdock_migrations_total{direction="out",outcome="rolled_back",code="18"} 1"#),
            "\(after)"
        )
    }

    @Test func anEvacuationIsSeenAndCancelled() async throws {
        let lab = try Lab()
        let a = try await Page(lab, "a")
        try await lab.startDestination("b")
        for name in ["web1", "web2"] {
            try await lab.startIdleGuest(name, disks: [try await lab.makeImage("\(name).raw", megabytes: 64, data: 30)])
        }
        let cookie = try await a.signIn()
        let begun = try await lab.crossdock(
            ["evacuate", "--to", "localhost:\(lab.controlPort(of: "b"))", "--state-dir", lab.state("a")]
                + lab.credentials() + ["--bandwidth", "1M", "--known-only", "--detach"]
        )
        #expect(begun.code == 0, "\(begun.all)")
        let ended = try await a.watch(cookie) { watcher, first in
            let running = try await watcher.section("evacuation") { evacuation in
                evacuation["guests"]?.array.contains { $0["state"] == "copying" && $0["percent"] != nil } == true
            }
            #expect(running["state"] == "running" && running["guests"]?.array.count == 2)
            #expect(running["counts"]?["waiting"] != nil && first["host"]?["cordon"]?.string != nil)
            let id = running["id"]?.string ?? ""
            let asked = try await a.act(cookie, #"{"action":"cancel-evacuation","evacuation":"\#(id)"}"#)
            #expect(asked.status == 202, "\(asked.text)")
            return try await watcher.section("evacuation") { $0["state"] == "cancelled" }
        }
        #expect(ended["counts"]?["left"] == 2 && ended["guests"]?.array.allSatisfy { $0["state"] == "left" } == true)
        let figures = try await a.figures()
        #expect(figures.contains("crossdock_evacuation_guests{state=\"left\"} 2\n"), "\(figures)")
        #expect(figures.contains("crossdock_trouble{kind=\"left\"} 1\n"), "\(figures)")
    }

    @Test func anAgentWithoutAPageSaysSo() async throws {
        let lab = try Lab()
        try await lab.startDestination("b")
        let made = try await lab.crossdock(["web", "ticket", "--state-dir", lab.state("b")])
        #expect(made.code == 15 && made.all.contains("start it with --web"), "\(made.all)")
        let none = try await lab.crossdock(["web", "ticket", "--state-dir", lab.state("c")])
        #expect(none.code == 11 && none.all.contains("There is no running destination agent"), "\(none.all)")
        for bad in [["--web", "vsock:1:2"], ["--web-name", "x"], ["--metrics", "unix:/x"]] {
            let refused = try await lab.crossdock(["destination", "--state-dir", lab.state("c")] + bad)
            #expect(refused.code == 64, "\(refused.all)")
        }
    }
}
