import Glibc
import NBD

/// A line on the terminal that shows how far a copy is.
final class ProgressMeter: Sendable {
    private let copy: DiskCopy
    private let size: UInt64
    private let task: Task<Void, Never>?

    init(_ copy: DiskCopy, size: UInt64, isOn: Bool) {
        self.copy = copy
        self.size = size
        guard isOn else {
            task = nil
            return
        }
        let start = ContinuousClock.now
        task = Task {
            let isTerminal = isatty(2) == 1
            while !Task.isCancelled {
                try? await Task.sleep(for: isTerminal ? .milliseconds(200) : .seconds(2))
                Self.show(copy, size, start, isTerminal)
            }
        }
    }

    private static func show(_ copy: DiskCopy, _ size: UInt64, _ start: ContinuousClock.Instant, _ isTerminal: Bool) {
        let done = copy.position
        let percent = size == 0 ? 100 : Double(done) / Double(size) * 100
        let seconds = max((ContinuousClock.now - start) / .seconds(1), 0.001)
        let rate = Double(copy.summary.read) / seconds / Double(1 << 20)
        let text = "\(Int(percent)) %  \(Int(rate)) MiB/s"
        let bytes = Array((isTerminal ? "\r\(text)  " : "\(text)\n").utf8)
        _ = bytes.withUnsafeBytes { write(2, $0.baseAddress, $0.count) }
    }

    func end() {
        guard let task else { return }
        task.cancel()
        if isatty(2) == 1 { printError("\r100 %            ") }
    }
}
