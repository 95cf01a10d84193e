import CLinux
import Glibc
import Source

/// A line for each guest that changes on a terminal, plain lines elsewhere.
struct EvacuationScreen {
    private let json: Bool
    private let isTerminal = isatty(1) == 1
    private var lines = 0
    private var lastProgress = ContinuousClock.now - .seconds(10)

    init(json: Bool) { self.json = json }

    mutating func show(_ event: EvacuationEvent) {
        if json { return output(event.line) }
        clear()
        switch event.event {
        case "warning": printError("crossdock: \(event.guest.map { "\($0): " } ?? "")\(event.message ?? "")")
        case "guest":
            var line = "\(event.guest ?? "?")  \(event.state ?? "")"
            if let target = event.target { line += event.state == "moved" ? " to \(target)" : ", to \(target)" }
            if let pause = event.blackoutMS { line += ", paused for \(Int(pause.rounded())) ms" }
            if let message = event.message { line += ": \(message)" }
            output(line + "\n")
        default: break
        }
    }

    mutating func show(_ progress: EvacuationProgress) {
        guard ContinuousClock.now - lastProgress >= (isTerminal ? .milliseconds(200) : .seconds(2)) else { return }
        lastProgress = .now
        let active = progress.guests.filter { ["copying", "switching"].contains($0.state) && $0.percent != nil }
        if json {
            for guest in active {
                var event = EvacuationEvent("progress", evacuation: progress.evacuation, time: time(nil))
                (event.guest, event.state, event.target) = (guest.name, guest.state, guest.target)
                (event.phase, event.percent) = (guest.phase, guest.percent)
                (event.rate, event.remaining) = (guest.rate, guest.remaining)
                output(event.line)
            }
            return
        }
        guard isTerminal else { return output(active.map { line($0) + "\n" }.joined()) }
        clear()
        let measured = Int(xd_terminal_width(1))
        let width = measured > 0 ? max(measured, 20) : 80
        let moved = progress.guests.count { $0.state == "moved" }
        var total = "\(moved) of \(progress.guests.count) have moved"
        if let remaining = progress.remaining { total += ", about \(ProgressRenderer.time(remaining)) left" }
        let text = progress.guests.map(line) + [total]
        output(text.map { String($0.prefix(width - 1)) + "\n" }.joined())
        lines = text.count
    }

    private func line(_ guest: EvacuationProgress.Guest) -> String {
        func pad(_ text: String, _ width: Int) -> String {
            text + String(repeating: " ", count: max(1, width - text.count))
        }
        var line = pad(guest.name, 16) + pad(guest.state, 11) + pad(guest.target ?? "-", 16)
        if let phase = guest.phase { line += pad(phase, 11) }
        if let percent = guest.percent { line += pad("\(Int(percent))%", 6) }
        if let rate = guest.rate, rate >= 1 { line += pad(ProgressRenderer.bytes(rate) + "/s", 12) }
        if let remaining = guest.remaining, remaining < 360_000 { line += "\(ProgressRenderer.time(remaining)) left" }
        if let pause = guest.blackoutMS { line += "paused for \(Int(pause.rounded())) ms" }
        return line + (guest.message ?? "")
    }

    mutating func finish() { clear() }

    private mutating func clear() {
        if lines > 0 { output("\u{1b}[\(lines)A\u{1b}[J") }
        lines = 0
    }
}
