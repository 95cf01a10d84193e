internal import IO
internal import Synchronization

/// The right of one guest to have its switchover on a host, while no other one has.
///
/// It ends with `end`, with its last reference, with the connection, or when the host takes it back because it lasts too long while
/// others wait. It guards the length of pauses only: a switchover that is under way goes on without it. From any thread.
public final class SwitchoverTurn: Sendable {
    private let isOver = Atomic<Bool>(false)
    private let giveBack: @Sendable () -> Void

    init(giveBack: @escaping @Sendable () -> Void) { self.giveBack = giveBack }

    deinit { end() }

    /// Whether it still is this guest's turn, as far as is known here.
    public var isHeld: Bool { !isOver.load(ordering: .acquiring) }

    /// Lets others have their turn. May be called again.
    public func end() { if !isOver.exchange(true, ordering: .acquiringAndReleasing) { giveBack() } }

    /// It was taken back, or its connection is lost.
    func lapse() { isOver.store(true, ordering: .releasing) }
}
