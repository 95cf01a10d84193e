import Glibc
import NBD

/// A line on the terminal that shows how far a copy is.
final class ProgressMeter: Sendable {
    private let copy: DiskCopy
    private let size: UInt64
    private let task: Task<Void, Never>?
    /// Where programs read it, as nbdcopy writes it; nil for people at standard error.
    private let descriptor: Int32?

    init(_ copy: DiskCopy, size: UInt64, isOn: Bool, descriptor: Int32? = nil) {
        self.copy = copy
        self.size = size
        self.descriptor = descriptor
        guard isOn else {
            task = nil
            return
        }
        let start = ContinuousClock.now
        task = Task {
            let isTerminal = isatty(2) == 1
            while !Task.isCancelled {
                if let descriptor {
                    Self.tell(size == 0 ? 100 : Int(Double(copy.position) / Double(size) * 100), to: descriptor)
                    try? await Task.sleep(for: .milliseconds(200))
                    continue
                }
                try? await Task.sleep(for: isTerminal ? .milliseconds(200) : .seconds(2))
                Self.show(copy, size, start, isTerminal)
            }
        }
    }

    private static func tell(_ percent: Int, to descriptor: Int32) {
        let bytes = Array("\(percent)/100\n".utf8)
        _ = bytes.withUnsafeBytes { write(descriptor, $0.baseAddress, $0.count) }
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
        if let descriptor { return Self.tell(100, to: descriptor) }
        if isatty(2) == 1 { printError("\r100 %            ") }
    }
}
