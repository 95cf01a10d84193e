import IO
import Migration

/// Findings as JSON; `docs/report.md` describes it.
struct DoctorReport: Encodable {
    /// The other host, as it was named; nil without one.
    var host: String?
    /// Whether nothing fails.
    var good: Bool
    var findings: [Finding]

    init(host: String?, findings: [Finding]) {
        self.host = host
        self.findings = findings
        good = !findings.contains { $0.result == .fail }
    }

    var text: String {
        get throws { String(decoding: try JSONText.encode(self, pretty: true), as: UTF8.self) + "\n" }
    }
}

/// Findings as a table, and what is wrong with its remedy under it.
enum FindingView {
    static func table(_ findings: [Finding], there host: String?) -> String {
        var text = Table.render(
            ["RESULT", "CHECK", "GUEST", "HERE", host == nil ? "" : "THERE"],
            findings.map { [$0.result.rawValue, $0.check.rawValue, $0.guest ?? "", $0.here ?? "", $0.there ?? ""] }
        )
        for finding in findings {
            guard let message = finding.message else { continue }
            let guest = finding.guest.map { " of guest '\($0)'" } ?? ""
            text += "\n\(finding.result.rawValue): \(finding.check.title)\(guest): \(message).\n"
            if let remedy = finding.remedy { text += "      do: \(remedy)\n" }
        }
        let (failures, warnings) = (count(findings, .fail), count(findings, .warn))
        text += "\n"
        text +=
            failures == 0
            ? (host == nil ? "Nothing fails" : "Guests can move") : "\(failures) of \(findings.count) checks fail"
        text += warnings == 0 ? ".\n" : "; \(warnings) to look at.\n"
        return text
    }

    private static func count(_ findings: [Finding], _ result: Finding.Result) -> Int {
        findings.filter { $0.result == result }.count
    }
}
