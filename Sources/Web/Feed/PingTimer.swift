internal import IO

/// Says again and again that a ping is due. Confined to its loop.
final class PingTimer {
    private let loop: EventLoop
    private let fire: () -> Void
    private var timer: LoopTimer?
    private var isDue = false

    init(_ loop: EventLoop, _ fire: @escaping () -> Void) {
        self.loop = loop
        self.fire = fire
        start()
    }

    private func start() {
        timer = loop.schedule(after: WebLimits.ping) { [weak self] in
            guard let self else { return }
            isDue = true
            start()
            fire()
        }
    }

    func takeDue() -> Bool {
        defer { isDue = false }
        return isDue
    }

    func end() { timer?.cancel() }
}
