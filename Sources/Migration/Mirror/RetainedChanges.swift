/// What the destination has acknowledged and not made durable, in the order of the acknowledgements.
///
/// Several FLUSHes may be under way at once, each of which covers what was acknowledged before it was sent: on a long line one answer a round
/// trip would be too few.
struct RetainedChanges {
    /// What a FLUSH covers.
    struct Mark {
        fileprivate let end: UInt64
        fileprivate let life: Int
    }

    /// Their payload, in bytes.
    private(set) var bytes = 0
    /// The payload that no FLUSH under way covers, in bytes.
    private(set) var uncovered = 0
    /// How many FLUSHes are under way.
    private(set) var flushes = 0
    private var changes: [DiskChange] = []
    /// How many changes were dropped from the front, ever.
    private var dropped: UInt64 = 0
    /// How many changes there had been when the last FLUSH was sent.
    private var covered: UInt64 = 0
    /// Which life of the destination's agent they belong to.
    private var life = 0

    var count: Int { changes.count }
    /// How many of them no FLUSH under way covers.
    var countUncovered: Int { changes.count - Int(covered - dropped) }
    var isEmpty: Bool { changes.isEmpty }

    mutating func append(_ change: DiskChange) {
        changes.append(change)
        bytes += change.bytes
        uncovered += change.bytes
    }

    /// A FLUSH is sent now.
    mutating func beginFlush() -> Mark {
        flushes += 1
        covered = dropped + UInt64(changes.count)
        uncovered = 0
        return Mark(end: covered, life: life)
    }

    /// A FLUSH was answered, or lost.
    ///
    /// - Returns: whether what it covers is durable; it is not when the destination began a new life meanwhile.
    @discardableResult
    mutating func endFlush(_ mark: Mark, isDurable: Bool) -> Bool {
        flushes -= 1
        guard mark.life == life else { return false }
        if isDurable {
            // One that was sent later may have been answered earlier.
            if mark.end > dropped {
                let count = Int(mark.end - dropped)
                for change in changes[..<count] { bytes -= change.bytes }
                changes.removeFirst(count)
                dropped = mark.end
            }
        } else {
            covered = dropped
            uncovered = bytes
        }
        return isDurable
    }

    /// The destination began a new life: nobody knows what it still has.
    ///
    /// - Returns: all of them, to be sent again.
    mutating func takeAll() -> [DiskChange] {
        let all = changes
        removeAll()
        return all
    }

    mutating func removeAll() {
        life += 1
        dropped += UInt64(changes.count)
        covered = dropped
        changes = []
        bytes = 0
        uncovered = 0
    }
}
