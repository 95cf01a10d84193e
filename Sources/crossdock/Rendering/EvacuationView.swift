import FoundationEssentials
import IO
import Migration
import Source

/// Shows an evacuation: the look before it, how far it is, and how it went.
enum EvacuationView {
    // MARK: Before

    private struct SurveyLine: Codable {
        var event = "survey"
        var guests: [EvacuationSurvey.Row]
        var warnings: [String]
        var mayBegin: Bool

        enum CodingKeys: String, CodingKey {
            case event, guests, warnings
            case mayBegin = "may_begin"
        }
    }

    static func show(_ survey: EvacuationSurvey, json: Bool) {
        if json {
            let line = SurveyLine(guests: survey.rows, warnings: survey.warnings, mayBegin: survey.mayBegin)
            if let data = try? JSONText.encode(line) { output(String(decoding: data, as: UTF8.self) + "\n") }
            return
        }
        for warning in survey.warnings { printError("crossdock: warning: \(warning)") }
        if survey.rows.isEmpty { return output("There is no guest on this host to be moved.\n") }
        func bytes(_ count: UInt64?) -> String { count.map { ProgressRenderer.bytes(Double($0)) } ?? "-" }
        let moving = survey.rows.filter { $0.reason == nil }
        if !moving.isEmpty {
            output(
                Table.render(
                    ["GUEST", "TARGET", "DISKS", "MEMORY", "WRITES", "ESTIMATED COPY", "ESTIMATED PAUSE"],
                    moving.map { row in
                        [
                            row.guest, row.target ?? "-", bytes(row.disk), bytes(row.memory),
                            row.writes.map { ProgressRenderer.bytes($0) + "/s" } ?? "-",
                            row.seconds.map(ProgressRenderer.time) ?? "may not converge",
                            row.pauseMS.map { "up to \($0) ms" } ?? "none",
                        ]
                    }
                )
            )
            let known = moving.compactMap(\.seconds)
            let count = moving.count == 1 ? "1 guest" : "\(moving.count) guests"
            let sum = known.reduce(0, +)
            let time = known.isEmpty ? "" : ", about \(ProgressRenderer.time(sum)) one after the other"
            let rest = known.count == moving.count ? "" : ", and \(moving.count - known.count) may not converge"
            output("\(count)\(time)\(rest).\n")
        }
        for row in survey.rows {
            if let reason = row.reason { output("\(row.guest) \(row.isWanted ? "stays" : "cannot go"): \(reason)\n") }
        }
    }

    // MARK: While it goes on

    private static func read<T: Decodable>(_ path: String) -> T? {
        ((try? DurableFile.read(path)) ?? nil).flatMap { JSONText.decode(T.self, from: $0) }
    }

    static func showStatus(_ plan: Evacuation, _ files: EvacuationFiles, json: Bool) throws {
        let report: EvacuationReport? = read(files.report(of: plan.id))
        let progress: EvacuationProgress? = read(files.progress(of: plan.id))
        if json {
            if let report { return output(report.json) }
            return output(String(decoding: try JSONText.encode(progress, pretty: true), as: UTF8.self) + "\n")
        }
        output(
            Table.render(
                ["GUEST", "STATE", "TARGET", "PHASE", "DONE", "PAUSE", "DETAIL"],
                (report?.guests ?? progress?.guests ?? []).map { guest in
                    [
                        guest.name, guest.state, guest.target ?? "-", guest.phase ?? "-",
                        guest.percent.map { "\(Int($0))%" } ?? "-",
                        guest.blackoutMS.map { "\(Int($0.rounded())) ms" } ?? "-", guest.message ?? "",
                    ]
                }
            )
        )
        let began = "Evacuation \(plan.id), begun \(UTCTime.text(plan.began))"
        if let report {
            output("\(began), ended \(UTCTime.text(report.ended)). \(report.sentence).\n")
        } else if files.isCoordinated {
            output("\(began), is under way.\n")
        } else {
            output(
                "\(began), was interrupted: nobody begins another guest. 'crossdock evacuate --resume \(plan.id)' goes on "
                    + "with it.\n"
            )
        }
    }

    /// Shows an evacuation until it is over. Returns its exit code.
    static func watch(_ id: String, _ files: EvacuationFiles, json: Bool) async throws -> Int32 {
        var screen = EvacuationScreen(json: json)
        defer { screen.finish() }
        var seen = 0
        var silent = 0
        while true {
            let isCoordinated = files.isCoordinated
            let report: EvacuationReport? = read(files.report(of: id))
            // The last event follows the report: when that is there, whoever writes is about to end.
            let isOver = report != nil && !isCoordinated
            let bytes = ((try? DurableFile.read(files.events(of: id))) ?? nil) ?? []
            let end = bytes.lastIndex(of: UInt8(ascii: "\n")).map { $0 + 1 } ?? 0
            for line in bytes[min(seen, end)..<end].split(separator: UInt8(ascii: "\n")) {
                if let event = EvacuationEvent(parsing: Array(line)) { screen.show(event) }
            }
            seen = end
            if let report, isOver {
                screen.finish()
                if !json {
                    if report.code == 0 {
                        output("\(report.sentence).\n")
                    } else {
                        printError("crossdock: \(report.sentence)")
                    }
                }
                return report.code
            }
            if let progress: EvacuationProgress = read(files.progress(of: id)) { screen.show(progress) }
            silent = isCoordinated ? 0 : silent + 1
            if silent > 10 { throw interrupted(id, files) }
            try await Task.sleep(for: .milliseconds(200))
        }
    }

    private static func interrupted(_ id: String, _ files: EvacuationFiles) -> MigrationError {
        let words = ((try? DurableFile.read(files.log(of: id))) ?? nil)
            .flatMap { $0.split(separator: UInt8(ascii: "\n")).last }
            .map { ": " + String(decoding: $0, as: UTF8.self) }
        return MigrationError(
            .undecided,
            "The process that coordinates evacuation \(id) has ended\(words ?? ""). Migrations that it has begun go on by themselves; "
                + "'crossdock evacuate --resume \(id)' goes on with the others"
        )
    }
}
