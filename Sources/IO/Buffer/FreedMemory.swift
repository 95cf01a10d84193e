internal import CLinux

/// What a flood of connections has taken and freed: glibc keeps it for the thread that had it, for ever, since of each connection a little stays in
/// between. It is given back once the flood is over. From any thread.
final class FreedMemory: Sendable {
    private struct Connections {
        var open = 0
        /// The most there were since memory was given back.
        var most = 0
        var isDue = false

        /// Whether a flood is over.
        var isQuiet: Bool { most >= FreedMemory.flood && open <= most / 8 }
    }

    /// That of the process.
    static let shared = FreedMemory()
    /// How many connections are one.
    private static let flood = 64
    /// How long it has been over: giving back takes milliseconds, in which other threads may wait for memory.
    private static let rest = Duration.seconds(5)

    private let connections = Guarded(Connections())

    /// A connection has come.
    func began() {
        connections.withLock { connections in
            connections.open += 1
            connections.most = max(connections.most, connections.open)
        }
    }

    /// One has ended. Called on a loop.
    func ended(on loop: EventLoop) {
        let isDue = connections.withLock { connections in
            connections.open -= 1
            guard connections.isQuiet, !connections.isDue else { return false }
            connections.isDue = true
            return true
        }
        if isDue { loop.schedule(after: Self.rest) { self.giveBack() } }
    }

    private func giveBack() {
        let isOver = connections.withLock { connections in
            connections.isDue = false
            guard connections.isQuiet else { return false }
            connections.most = connections.open
            return true
        }
        if isOver { Task { await BlockingPool.shared.value { _ = xd_give_back_freed() } } }
    }
}
