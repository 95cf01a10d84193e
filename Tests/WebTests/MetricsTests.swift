import FoundationEssentials
import IO
import Migration
import TestSupport
import Testing

@testable import Web

/// The figures, and their text.
@Suite(.timeLimit(.minutes(1)))
struct MetricsTests {
    @Test func theTextIsThatOfTheFormat() throws {
        var text = MetricsText()
        text.add(.build, 1, ["version": "a\"b\\c\nd", "protocol": "1"])
        text.add(.rate, nil, ["guest": "g"])
        text.add(.rate, 1.5e9, ["guest": "g"])
        var histogram = Histogram([0.5, 1])
        for value in [0.1, 0.5, 0.7, 3, .nan, -1, .infinity] { histogram.add(value) }
        text.add(.pause, histogram)
        #expect(
            text.text.contains(#"crossdock_build_info{version="a\"b\\c\nd",protocol="1"} 1"#)
        )
        #expect(text.text.contains("crossdock_migration_transfer_bytes_per_second{guest=\"g\"} 1500000000\n"))
        #expect(text.text.contains("crossdock_blackout_seconds_bucket{le=\"0.5\"} 2\n"))
        #expect(text.text.contains("crossdock_blackout_seconds_bucket{le=\"1\"} 3\n"))
        #expect(text.text.contains("crossdock_blackout_seconds_bucket{le=\"+Inf\"} 4\n"))
        #expect(text.text.contains("crossdock_blackout_seconds_count 4\n"))
        try Exposition.check(text.text)
    }

    @Test func namesFollowTheRulesOfPrometheus() {
        for metric in Metric.allCases {
            let name = metric.rawValue
            #expect(name.hasPrefix("crossdock_") && name.allSatisfy { $0.isLowercase || $0 == "_" }, "\(name)")
            #expect(name.hasSuffix("_total") == (metric.kind == .counter), "\(name)")
            for suffix in ["_bucket", "_sum", "_count", "_ms", "_milliseconds", "_percent"] {
                #expect(!name.hasSuffix(suffix), "\(name)")
            }
            #expect(metric.help.hasSuffix(".") && !metric.help.contains("\n"))
        }
        #expect(Set(Metric.allCases.map(\.rawValue)).count == Metric.allCases.count)
    }

    @Test func migrationsAddUpAndStayCounted() throws {
        let directory = try TestDirectory()
        let store = MigrationStore(stateDirectory: directory.path)
        func add(_ id: String, _ records: [JournalRecord], _ change: ((inout MigrationReport) -> Void)? = nil) throws {
            let files = store.files(of: id)
            try DurableFile.makeDirectory(files.directory)
            let journal = try Journal(creating: files.journal)
            for record in records { try journal.append(record) }
            guard let change else { return }
            var report = MigrationReport(migration: id, guest: "g", destination: "b")
            change(&report)
            try DurableFile.write(Array(report.json.utf8), to: files.report)
        }
        try add("100-a", [.offered(guest: "g", destination: "b", order: 0), .released, .confirmed]) {
            ($0.outcome, $0.blackoutMS, $0.totalMS, $0.ramBytesSent) = (.migrated, 200, 4000, 5000)
        }
        try add("200-a", [.offered(guest: "g", destination: "b", order: 1), .rolledBack(reason: "no")]) {
            ($0.code, $0.totalMS, $0.reconnects) = (14, 9000, 2)
        }
        try add("300-a", [.accepted(guest: "h", source: "CN=c", order: 2), .rolledBack(reason: "no")])
        try add("400-a", [.offered(guest: "i", destination: "b", order: 3)])
        var ledger = MigrationLedger(store)
        ledger.look()
        var totals = MigrationTotals()
        totals.take(ledger)
        func lines() throws -> String {
            var text = MetricsText()
            totals.write(to: &text)
            try Exposition.check(text.text)
            return text.text
        }
        let first = try lines()
        for line in [
            #"crossdock_migrations_total{direction="out",outcome="done",code="0"} 1"#,
            #"crossdock_migrations_total{direction="out",outcome="rolled_back",code="14"} 1"#,
            #"crossdock_migrations_total{direction="in",outcome="rolled_back",code="0"} 1"#,
            "crossdock_blackout_seconds_sum 0.2", "crossdock_blackout_seconds_bucket{le=\"0.25\"} 1",
            "crossdock_migration_duration_seconds_count 1", "crossdock_migration_duration_seconds_sum 4",
            #"crossdock_transferred_bytes_total{channel="memory",direction="out"} 5000"#,
            "crossdock_reconnects_total 2",
        ] {
            #expect(first.contains("\(line)\n"), "\(line) in \(first)")
        }
        DurableFile.remove(store.directory(of: "300-a"))
        ledger.look()
        totals.take(ledger)
        #expect(try lines() == first)
    }

    @Test func whatTheAgentCountsItselfIsTold() async throws {
        let lab = try await WebLab {
            $0.host.traffic = { .init(exportConnections: 3, diskBytes: 4096, memoryBytes: 8192) }
        }
        func handshakes(_ result: String, in text: String) -> Int {
            let name = "crossdock_tls_handshakes_total{result=\"\(result)\"} "
            guard let range = text.firstRange(of: name) else { return -1 }
            return Int(text[range.upperBound...].prefix { $0.isNumber }) ?? -1
        }
        let before = await onServer(lab) { await $0.metricsText(namesGuests: false) }
        for line in [
            "crossdock_export_connections 3", #"crossdock_transferred_bytes_total{channel="disk",direction="in"} 4096"#,
            #"crossdock_transferred_bytes_total{channel="memory",direction="in"} 8192"#,
            #"crossdock_console_sessions{kind="serial"} 0"#, #"crossdock_console_sessions{kind="vnc"} 0"#,
        ] {
            #expect(before.contains("\(line)\n"), "\(line) in \(before)")
        }
        try Exposition.check(before)
        // Other tests of this process shake hands, too.
        let host = lab.host
        try await lab.client { client in _ = try await client.ask("GET", "/healthz", ["Host": host]) }
        let (address, loop) = (lab.address, EventLoop(name: "stranger"))
        defer { loop.stop() }
        try await loop.run {
            let stranger = try await SocketChannel.connect(to: address, on: loop)
            try await stranger.write(Array("this is no TLS, whatever comes behind it\r\n\r\n".utf8))
            while let rest = try? await stranger.read(exactly: 1), !rest.isEmpty {}
            stranger.close()
        }
        try await eventually("both are counted") {
            let after = await self.onServer(lab) { await $0.metricsText(namesGuests: false) }
            return ["accepted", "failed"].allSatisfy {
                handshakes($0, in: before) >= 0 && handshakes($0, in: after) > handshakes($0, in: before)
            }
        }
        await lab.server.stop()
    }

    /// promtool judges too, where it is: `CROSSDOCK_PROMTOOL=PATH`, or in PATH.
    @Test func promtoolHasNothingAgainstIt() async throws {
        let lab = try await WebLab()
        var text = await onServer(lab) { await $0.metricsText(namesGuests: true) }
        await lab.server.stop()
        try Exposition.check(text)
        // Those that only a host has on which something happens.
        var others = MetricsText()
        for metric in Metric.allCases where !text.contains("# TYPE \(metric.rawValue) ") {
            others.add(metric, 1.5, ["guest": "web1"])
        }
        text += others.text
        try Exposition.check(text)
        let known = ProcessInfo.processInfo.environment["CROSSDOCK_PROMTOOL"] ?? "/usr/bin/promtool"
        guard DurableFile.exists(known) else { return }
        let path = lab.directory.file("metrics")
        try DurableFile.write(Array(text.utf8), to: path)
        let judged = try await Tool.run(["sh", "-c", "'\(known)' check metrics < '\(path)'"])
        #expect(judged.code == 0 && judged.all.isEmpty, "\(judged.all)")
    }

    private func onServer(_ lab: WebLab, _ body: @escaping @Sendable (WebServer) async -> String) async -> String {
        let server = lab.server
        return (try? await server.loop.run { await body(server) }) ?? ""
    }
}

/// A strict reader of Prometheus' text format, version 0.0.4.
enum Exposition {
    /// Throws a failure that names the first line which the format does not have.
    static func check(_ text: String) throws {
        guard text.hasSuffix("\n") else { throw TestFailure("the last line does not end") }
        var (seen, current, kind): (Set<String>, String, String) = ([], "", "")
        var series: Set<String> = []
        var hasHelp = false
        for line in text.dropLast().split(separator: "\n", omittingEmptySubsequences: false) {
            func fail(_ what: String) -> TestFailure { TestFailure("\(what): \(line)") }
            let words = line.split(separator: " ", maxSplits: 3, omittingEmptySubsequences: false).map(String.init)
            if line.hasPrefix("# HELP ") {
                guard words.count == 4, seen.insert(words[2]).inserted else { throw fail("a metric comes twice") }
                (current, kind, hasHelp) = (words[2], "", true)
                continue
            }
            if line.hasPrefix("# TYPE ") {
                guard words.count == 4, words[2] == current, hasHelp, kind.isEmpty,
                    ["counter", "gauge", "histogram"].contains(words[3])
                else { throw fail("a type that is none") }
                kind = words[3]
                continue
            }
            guard let match = line.wholeMatch(of: sample) else { throw fail("no sample") }
            let name = String(match.1)
            let suffixes = kind == "histogram" ? ["_bucket", "_sum", "_count"] : [""]
            guard suffixes.contains(where: { current + $0 == name }) else { throw fail("a sample of no metric") }
            if kind == "counter", !current.hasSuffix("_total") { throw fail("a counter's name") }
            guard series.insert("\(name)\(match.2 ?? "")").inserted else { throw fail("a series comes twice") }
            guard Double(match.3.replacing("+Inf", with: "inf")) != nil else { throw fail("no number") }
        }
    }

    private nonisolated(unsafe) static let sample =
        /([a-zA-Z_:][a-zA-Z0-9_:]*)(\{[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"(?:,[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*")*\})? ([-+0-9.eE]+|\+Inf|NaN)/
}
