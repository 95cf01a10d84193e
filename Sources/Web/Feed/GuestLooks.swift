internal import Emulator
internal import IO
internal import Migration

/// What the monitors of guests have said last. They are asked one after the other, seldom, and never one that a migration works with or
/// that has one monitor only: a monitor serves one client at a time.
///
/// Confined to its loop.
final class GuestLooks: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// What a guest's QEMU says of it.
    struct Look: Sendable, Hashable {
        var status: String
        var emulator: String
        var memory: UInt64
        var processors: UInt64
        var disk: UInt64
        /// Why it cannot be moved; nil when nothing is known.
        var blocker: String?
    }

    /// After how long a guest is asked again.
    private static let period = Duration.seconds(60)
    /// How long all the guests of one turn may take to answer.
    private static let turn = Duration.milliseconds(500)
    private static let patience = Duration.seconds(1)

    private let store: GuestStore
    private let loop: EventLoop
    private var asked: [String: (process: EmulatorProcess, at: ContinuousClock.Instant)] = [:]
    private var isAsking = false
    /// What is known, by the names of the guests.
    private(set) var looks: [String: Look] = [:]

    init(_ store: GuestStore, on loop: EventLoop) {
        self.store = store
        self.loop = loop
    }

    /// Asks some of those who are due, unless others are being asked.
    ///
    /// - Parameters:
    ///   - guests: those who may be asked.
    ///   - names: those who are here. What they have said is kept while they may not be asked.
    func refresh(_ guests: [GuestRecord], of names: Set<String>) {
        for name in looks.keys where !names.contains(name) { looks[name] = nil }
        for name in asked.keys where !names.contains(name) { asked[name] = nil }
        let now = ContinuousClock.now
        let due = guests.filter { guest in
            guard let process = guest.process, guest.adopted == nil else { return false }
            guard let last = asked[guest.name] else { return true }
            return last.process != process || now - last.at > Self.period
        }
        guard !isAsking, !due.isEmpty else { return }
        isAsking = true
        Task(executorPreference: loop) {
            defer { self.isAsking = false }
            for guest in due where ContinuousClock.now - now < Self.turn { await self.ask(guest) }
        }
    }

    private func ask(_ guest: GuestRecord) async {
        guard let process = guest.process else { return }
        asked[guest.name] = (process, .now)
        guard let monitor = try? await store.connect(to: guest, .status, on: loop, timeout: Self.patience) else {
            looks[guest.name] = nil
            return
        }
        defer { monitor.close() }
        guard let found = try? await GuestInspection.inspect(monitor, guest) else { return }
        looks[guest.name] = Look(
            status: found.status,
            emulator: found.emulatorVersion,
            memory: found.memory,
            processors: UInt64(max(found.processors, 0)),
            disk: found.disks.reduce(0) { $0.addingSaturated($1.isReadOnly ? 0 : $1.size) },
            blocker: found.blockers.isEmpty ? nil : found.blockers.joined(separator: "; ")
        )
    }
}
