import CLinux
import Emulator
import Glibc
import IO
import Migration

/// Shows a migration's events.
protocol EventRenderer {
    mutating func render(_ event: MigrationEvent)
    mutating func finish()
}

/// One JSON event a line.
struct JSONRenderer: EventRenderer {
    mutating func render(_ event: MigrationEvent) { output(event.line) }
    mutating func finish() {}
}

/// A line that changes on a terminal, plain lines elsewhere, and a summary at the end.
struct ProgressRenderer: EventRenderer {
    let destination: String
    let stateDirectory: String
    private let isTerminal = isatty(1) == 1
    private var phase = ""
    private var hasLine = false
    private var lastPlain = -1.0

    init(destination: String, stateDirectory: String) {
        self.destination = destination
        self.stateDirectory = stateDirectory
    }

    private static let titles = [
        "check": "checking both sides", "queue": "waiting to copy", "disks": "copying disks",
        "verify": "verifying disks", "turn": "waiting to pause", "memory": "sending memory",
        "switchover": "switching over", "release": "handing over", "done": "finishing",
    ]

    mutating func render(_ event: MigrationEvent) {
        switch event.event {
        case "phase":
            phase = event.phase ?? ""
            show("\(Self.titles[phase] ?? phase)", always: true)
        case "progress":
            var line = pad(Self.titles[phase] ?? phase, 20) + pad("\(Int(event.percent ?? 0))%", 5)
            line += pad(Self.bytes(event.rate ?? 0) + "/s", 12)
            if let remaining = event.remaining, remaining < 360_000 { line += "\(Self.time(remaining)) left" }
            // Without a terminal a line every two seconds is enough.
            let due = event.ms - lastPlain >= 2000
            if !isTerminal, due { lastPlain = event.ms }
            show(line, always: isTerminal || due)
        case "warning":
            clear()
            printError("crossdock: \(event.message ?? "")")
        case "finished":
            clear()
            if let report = event.report { summarise(report) }
        default: break
        }
    }

    mutating func finish() { clear() }

    private mutating func show(_ line: String, always: Bool) {
        guard always else { return }
        if isTerminal {
            let measured = Int(xd_terminal_width(1))
            let width = measured > 0 ? max(measured, 20) : 80
            output("\r\u{1b}[K" + String(line.prefix(width - 1)))
            hasLine = true
        } else {
            output(line + "\n")
        }
    }

    private mutating func clear() {
        if hasLine { output("\r\u{1b}[K") }
        hasLine = false
    }

    private func rehearsed(_ report: MigrationReport, _ rehearsal: MigrationReport.Rehearsal) {
        func bytes(_ count: UInt64) -> String { Self.bytes(Double(count)) }
        var lines = ["Guest '\(report.guest)' can move to \(destination); nothing was moved."]
        let round = (rehearsal.roundTripMS * 10).rounded() / 10
        lines.append(
            "  rehearsal  a blank copy moved, \(Self.time(rehearsal.milliseconds / 1000)), \(bytes(rehearsal.bytes)) sent"
        )
        lines.append("  QEMU       \(rehearsal.emulatorHere) here, \(rehearsal.emulatorThere) there")
        lines.append(
            "  link       \(Self.bytes(rehearsal.bytesPerSecond))/s on one connection, \(round) ms there and back"
        )
        lines.append(
            "  disks      \(bytes(rehearsal.diskBytes)) in use, \(bytes(rehearsal.diskBytesAtMost)) at most, "
                + "\(bytes(rehearsal.freeBytes)) free there"
        )
        lines.append(
            "  writes     \(Self.bytes(rehearsal.memoryDirtyRate ?? 0))/s to memory of \(bytes(rehearsal.memoryBytes)), "
                + "\(Self.bytes(rehearsal.diskWriteRate ?? 0))/s to disks"
        )
        lines.append("  estimate   \(rehearsal.secondsEstimated.map(Self.time) ?? "may not converge")")
        for change in rehearsal.changes { lines.append("  change     \(change)") }
        output(lines.joined(separator: "\n") + "\n")
    }

    private func summarise(_ report: MigrationReport) {
        if report.outcome == .rehearsed, let rehearsal = report.rehearsal { return rehearsed(report, rehearsal) }
        guard report.outcome == .migrated else {
            printError("crossdock: \(report.reason ?? "The migration failed")")
            // The reason may have said so already.
            let guest = GuestWhereabouts(of: report.guest, stateDirectory: stateDirectory)
            if let sentence = guest.sentence(guest: report.guest), sentence != report.reason {
                printError("crossdock: \(sentence)\(sentence.hasSuffix(".") ? "" : ".")")
            }
            return
        }
        let disk = report.disks.reduce(0) { $0 + Double($1.bytesSent) }
        var lines: [String] = []
        if report.isOff == true {
            lines.append(
                "Guest '\(report.guest)' is on \(destination), and is off there as it was here; 'crossdock guest start \(report.guest)' "
                    + "there starts it."
            )
        } else if let state = report.guestState {
            lines.append(
                "Guest '\(report.guest)' is on \(destination), and stands there as it did here: \(state.sentence)."
            )
        } else {
            lines.append("Guest '\(report.guest)' runs on \(destination).")
            lines.append("  blackout  \(report.blackoutMS.map { "\(Int($0.rounded())) ms" } ?? "unknown")")
        }
        lines.append("  total     \(Self.time(report.totalMS / 1000))")
        guard report.tls != nil else {
            lines.append("  figures   not known: the agent that took them has ended")
            output(lines.joined(separator: "\n") + "\n")
            if let reason = report.reason { printError("crossdock: \(reason)") }
            return
        }
        var disks = "  disks     \(Self.bytes(disk)) sent"
        // What the guest wrote meanwhile is sent in later phases too.
        if let phase = report.phasesMS["disks"], let copied = report.copiedBytes, phase > 0, copied > 0 {
            disks += ", \(Self.bytes(Double(copied) * 1000 / phase))/s"
        }
        let saved = report.disks.reduce(0.0) { $0 + Double($1.bytesSent) - Double($1.bytesOnLine ?? $1.bytesSent) }
        if saved > disk / 20 { disks += ", compressed to \(Self.bytes(disk - saved))" }
        let seeded = report.disks.compactMap(\.seededBytes)
        if !seeded.isEmpty { disks += ", \(Self.bytes(seeded.reduce(0) { $0 + Double($1) })) were there" }
        lines.append(disks + (report.code == 0 ? ", digests equal" : ""))
        var memory = "  memory    \(Self.bytes(Double(report.ramBytesSent))) sent"
        if let onLine = report.ramBytesOnLine, onLine < report.ramBytesSent / 100 * 95 {
            memory += ", compressed to \(Self.bytes(Double(onLine)))"
        }
        lines.append(memory)
        if let tls = report.tls {
            lines.append("  TLS       \(tls.version), \(tls.cipher), \(tls.connections) connections")
        }
        output(lines.joined(separator: "\n") + "\n")
        if let reason = report.reason { printError("crossdock: \(reason)") }
    }

    private func pad(_ text: String, _ width: Int) -> String {
        text + String(repeating: " ", count: max(1, width - text.count))
    }

    static func bytes(_ count: Double) -> String {
        var value = count
        for unit in ["B", "KiB", "MiB", "GiB", "TiB"] {
            if value < 1000 || unit == "TiB" {
                let digits = unit == "B" || value >= 100 ? value.rounded() : (value * 10).rounded() / 10
                return digits == digits.rounded() ? "\(Int(digits)) \(unit)" : "\(digits) \(unit)"
            }
            value /= 1024
        }
        return ""
    }

    static func time(_ seconds: Double) -> String { SpanText.of(seconds) }
}
