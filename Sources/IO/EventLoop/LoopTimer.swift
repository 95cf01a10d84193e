/// An action that a loop runs at a deadline. Touched only on the loop's thread.
public final class LoopTimer {
    let deadline: ContinuousClock.Instant
    private var action: (() -> Void)?

    init(deadline: ContinuousClock.Instant, action: @escaping () -> Void) {
        self.deadline = deadline
        self.action = action
    }

    /// Drops the action; a timer that has fired is not affected.
    public func cancel() { action = nil }

    func fire() {
        let action = action
        self.action = nil
        action?()
    }
}

/// Timers ordered by deadline: a binary heap.
struct TimerHeap {
    private var items: [LoopTimer] = []

    var isEmpty: Bool { items.isEmpty }
    var nextDeadline: ContinuousClock.Instant? { items.first?.deadline }

    mutating func insert(_ timer: LoopTimer) {
        items.append(timer)
        var child = items.count - 1
        while child > 0 {
            let parent = (child - 1) / 2
            if items[parent].deadline <= items[child].deadline { break }
            items.swapAt(parent, child)
            child = parent
        }
    }

    mutating func popDue(_ now: ContinuousClock.Instant) -> LoopTimer? {
        guard let first = items.first, first.deadline <= now else { return nil }
        let last = items.removeLast()
        if !items.isEmpty {
            items[0] = last
            var parent = 0
            while true {
                let left = 2 * parent + 1
                let right = left + 1
                var smallest = parent
                if left < items.count, items[left].deadline < items[smallest].deadline { smallest = left }
                if right < items.count, items[right].deadline < items[smallest].deadline { smallest = right }
                if smallest == parent { break }
                items.swapAt(parent, smallest)
                parent = smallest
            }
        }
        return first
    }
}
