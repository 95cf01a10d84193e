internal import Migration

/// What rehearsals have measured, so that the next one need not: of the line to a destination, and of a guest.
///
/// Several that measure the same line at once would each find a part of it only.
public struct RehearsedFigures: Sendable {
    /// What a guest does to its memory and disks, in bytes per second.
    struct Activity: Sendable {
        var memory = 0.0
        var disks = 0.0
    }

    /// The line to the destination; nil when it has to be measured.
    var line: LinkMeasure?
    /// What the guest does; nil when it has to be watched.
    var activity: Activity?

    /// Knows nothing.
    public init() {}

    /// Takes the line from the report of a rehearsal with the same destination.
    mutating func takeLine(from report: MigrationReport?) {
        guard line == nil, let rehearsal = report?.rehearsal, rehearsal.bytesPerSecond > 0 else { return }
        line = LinkMeasure(roundTrip: rehearsal.roundTripMS, rate: rehearsal.bytesPerSecond)
    }

    /// Takes what the guest does from the report of a rehearsal of the same guest.
    mutating func takeActivity(from report: MigrationReport?) {
        guard activity == nil, let rehearsal = report?.rehearsal, let memory = rehearsal.memoryDirtyRate else { return }
        activity = Activity(memory: memory, disks: rehearsal.diskWriteRate ?? 0)
    }
}
