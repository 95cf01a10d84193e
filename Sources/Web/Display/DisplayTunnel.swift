internal import IO

/// Passes on what the display of a guest and another host's agent say to each other, without looking at it. Confined to its loop.
final class DisplayTunnel: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// Between two looks at whether it may go on.
    private static let inspection = Duration.seconds(5)

    /// The guest.
    let guest: String
    private let far: any Channel
    private let near: any Channel
    private let loop: EventLoop
    private let backlog: DisplayBacklog
    private let mayStay: @Sendable () -> Bool
    private var isLeaving = false
    private var isOver = false
    private var staying: LoopTimer?
    private var inspecting: LoopTimer?

    /// - Parameters:
    ///   - guest: whose display it is.
    ///   - far: the one that was asked for it.
    ///   - near: what it gets, on the same loop.
    ///   - reserve: memory for what a guest that leaves has begun to say.
    ///   - mayStay: whether whoever asked still may have it.
    init(
        _ guest: String,
        _ far: any Channel,
        _ near: any Channel,
        reserve: DisplayReserve,
        mayStay: @escaping @Sendable () -> Bool
    ) {
        (self.guest, self.far, self.near, loop, self.mayStay) = (guest, far, near, far.loop, mayStay)
        backlog = DisplayBacklog(reserve)
    }

    /// The guest is about to be paused, to go on elsewhere.
    func warn() {
        isLeaving = true
        backlog.changed.signal()
        staying?.cancel()
        staying = loop.schedule(after: DisplayConversation.reserve) { [weak self] in self?.isLeaving = false }
    }

    /// Ends it at once.
    func end() {
        isOver = true
        far.abort(ChannelError(.closed, "The tunnel has ended"))
        near.abort(ChannelError(.closed, "The tunnel has ended"))
        backlog.changed.signal()
    }

    /// Runs until one of the two ends, and closes both. What the display has said reaches the other.
    func run() async {
        inspect()
        let forth = Task(executorPreference: loop) {
            await self.tell()
            self.end()
        }
        let writing = Task(executorPreference: loop) {
            guard await self.backlog.write(to: self.far, within: WebLimits.silence, until: { self.isOver }) else {
                return self.end()
            }
            try? await self.far.finishWriting()
            // A socket that is closed before all was read from it forgets what is still on its way.
            self.staying?.cancel()
            self.staying = self.loop.schedule(after: WebLimits.farewell) { [weak self] in self?.end() }
        }
        let buffer = IOBuffer(capacity: DisplayBacklog.piece)
        while let count = try? await near.readSome(into: buffer.mutable(0..<buffer.capacity)), count > 0 {
            backlog.append(buffer.bytes(0..<count))
            guard await backlog.room({ isLeaving }, until: { isOver }) else { break }
        }
        backlog.close()
        await writing.value
        await forth.value
        for timer in [staying, inspecting] { timer?.cancel() }
        near.close()
        far.close()
    }

    private func inspect() {
        inspecting = loop.schedule(after: Self.inspection) { [weak self] in
            guard let self else { return }
            if mayStay() { inspect() } else { end() }
        }
    }

    /// Passes on what the other host says, for as long as the display takes it, and reads the rest. A display that takes nothing for so long is gone.
    private func tell() async {
        var isTaken = true
        let buffer = IOBuffer(capacity: 16 << 10)
        while let count = try? await far.readSome(into: buffer.mutable(0..<buffer.capacity)), count > 0 {
            guard isTaken else { continue }
            do {
                try await near.withDeadline(WebLimits.silence, for: "Passing a display on") {
                    try await near.writeAll(buffer.bytes(0..<count))
                }
            } catch { isTaken = false }
        }
    }
}
