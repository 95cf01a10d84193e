internal import Synchronization

/// That nobody waits any more for work that is under way. From any thread.
final class Abandonment: Sendable {
    private let flag = Atomic<Bool>(false)

    /// Whether the work may end early.
    var hasHappened: Bool { flag.load(ordering: .relaxed) }

    /// Lets the work end early from now on.
    func happen() { flag.store(true, ordering: .relaxed) }
}
