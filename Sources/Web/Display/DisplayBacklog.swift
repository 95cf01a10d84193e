internal import IO

/// Memory for pictures that hosts' guests leave behind, shared by all who look. Confined to its loop.
final class DisplayReserve: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// How much of it is left, in bytes: two screens of 3840 by 2160 pixels are there at first.
    fileprivate(set) var left = 64 << 20
}

/// What a display has said that its viewer has not taken yet: a piece, and while the guest is about to leave as much as its display has begun to
/// say, since nobody could say the rest of it later. Confined to its loop.
final class DisplayBacklog {
    /// The most that one read takes, and that waits when nothing else is said.
    static let piece = 64 << 10
    /// The most that waits for one viewer: a screen of 3840 by 2160 pixels and what is told beside it.
    private static let most = 34 << 20

    private let reserve: DisplayReserve
    private var fifo = ByteFIFO(capacity: 2 * DisplayBacklog.piece)
    private var borrowed = 0
    /// Signalled by every change.
    let changed = AsyncCondition()
    /// Whether nothing is added any more.
    private var isClosed = false

    init(_ reserve: DisplayReserve) { self.reserve = reserve }

    deinit { reserve.left += borrowed }

    /// Waits until a piece may be added.
    ///
    /// - Parameters:
    ///   - isLeaving: whether the guest is about to leave.
    ///   - isOver: whether nothing is to be added any more.
    /// - Returns: whether it may be added.
    func room(_ isLeaving: () -> Bool, until isOver: () -> Bool) async -> Bool {
        while !isOver() {
            if fifo.count < Self.piece { return true }
            if isLeaving(), fifo.count < Self.most, reserve.left >= Self.piece { return true }
            await changed.wait()
        }
        return false
    }

    /// Adds bytes.
    func append(_ bytes: UnsafeRawBufferPointer) {
        fifo.append(bytes)
        borrow()
        changed.signal()
    }

    /// Writes what is added to a viewer, until the backlog is closed and empty or the viewer takes nothing any more.
    ///
    /// - Parameters:
    ///   - channel: what leads to the viewer.
    ///   - silence: how long it may take nothing.
    ///   - isOver: whether nothing is to be written any more.
    /// - Returns: whether all was written.
    @discardableResult
    func write(to channel: any Channel, within silence: Duration, until isOver: () -> Bool) async -> Bool {
        let buffer = IOBuffer(capacity: Self.piece)
        while !isOver() {
            let count = take(into: buffer.mutable(0..<buffer.capacity))
            if count == 0 {
                if isClosed { return true }
                await changed.wait()
                continue
            }
            do {
                try await channel.withDeadline(silence, for: "Sending to a viewer") {
                    try await channel.writeAll(buffer.bytes(0..<count))
                }
            } catch { return false }
            // A guest that draws all the time must not keep the loop to itself.
            await Task.yield()
        }
        return false
    }

    private func take(into target: UnsafeMutableRawBufferPointer) -> Int {
        let count = min(fifo.count, target.count)
        target.copyBytes(from: fifo.bytes.prefix(count))
        fifo.remove(count)
        if fifo.isEmpty, fifo.capacity > 2 * Self.piece { fifo = ByteFIFO(capacity: 2 * Self.piece) }
        borrow()
        changed.signal()
        return count
    }

    /// Nothing is added any more; what waits is taken still.
    func close() {
        isClosed = true
        changed.signal()
    }

    private func borrow() {
        let excess = max(0, fifo.count - 2 * Self.piece)
        reserve.left -= excess - borrowed
        borrowed = excess
    }
}
