internal import Migration

/// Decides what QEMU is told while it sends the memory: whether it may pause the guest, how fast it may send, and when the guest has to be
/// slowed down.
///
/// The disks are mirrored over the same line meanwhile. As long as what is left of them does not fit the pause, memory that is sent has
/// to be sent again; so where they fall behind, the memory gives them the line, and takes it back step by step once they fit.
///
/// QEMU pauses the guest as soon as what is left fits the pause that it may use, on a fast line all the memory of a small guest. So it gets a
/// tenth of that at first, and twice as much each time when it has gone through the memory and that was not enough. A QEMU to which each
/// pass is a risk gets all of it at once. QEMU reckons with the rate of its last tenth of a second, in which the memory may have gone no
/// further than into buffers: as much as that was higher than what comes through, less of the pause is allowed.
struct MemoryPacing {
    /// What is seen at one moment.
    struct Look {
        /// Bytes of memory that are left.
        var remaining: UInt64
        /// How many times QEMU has gone through the memory.
        var rounds: Int
        /// Bytes of memory a second that are sent, as QEMU has it: of its last tenth of a second.
        var rate: Double
        /// The same over about a second; 0 when it is not known yet.
        var steadyRate: Double
        /// Bytes that are sent for each byte of memory that has changed: less than 1 where QEMU sends differences.
        var yield = 1.0
        /// Bytes of memory a second that QEMU gets through with.
        var memoryRate: Double { rate / yield }
        /// Bytes of memory a second that the guest changes; 0 when QEMU does not know yet.
        var dirtyRate: Double
        /// Bytes of the disks that are left.
        var disks: UInt64
        /// Whether these fit the pause.
        var disksFit: Bool
        /// Whether the destination is away.
        var isAway: Bool
    }

    /// What QEMU is to be told.
    enum Order: Hashable {
        /// How much of the plan's longest pause QEMU may use, as it reckons; with 0 it does not pause the guest.
        case gate(share: Double)
        /// How many bytes a second of memory may be sent; nil for as many as the plan says.
        case speed(UInt64?)
        /// The guest is to be slowed down by so many percent of its time, and more as time goes on.
        case slowDown(percent: Int)
        /// The memory will never be through.
        case giveUp
    }

    private enum Speed {
        case full
        /// So many bytes a second, after so many at the beginning.
        case limited(Double, of: Double)
    }

    /// For how long disks are looked at before their share of the line is changed.
    static let window = Duration.seconds(1)
    /// The least share of the line that the memory keeps.
    private static let leastShare = 1.0 / 16
    /// After how many rounds without progress the guest is slowed down, and after how many after that, or when it may not be slowed down,
    /// there is no use in going on.
    private static let (patience, patienceWithThrottle) = (5, 12)

    /// By how many percent of its time the guest may be slowed down; 0 for not at all.
    private let mostSlowDown: Int

    private(set) var gateIsOpen = false
    private var share: Double
    /// What QEMU was told last.
    private var told = 0.0
    /// The rates of the last looks.
    private var rates: [Double] = []
    private static let (looks, tellingChange) = (10, 0.2)
    private var round = 0
    /// The least that was left after a pass.
    private var least = UInt64.max
    private var idleRounds = 0
    private var isThrottled = false
    private var speed = Speed.full
    /// Since when the disks are looked at, what was left of them then, and whether they have fitted, or not, all the time since.
    private var watched: (since: ContinuousClock.Instant, disks: UInt64, fit: Bool)?

    /// - Parameters:
    ///   - mostSlowDown: by how many percent of its time the guest may be slowed down, 0 to 99.
    ///   - hasFewPasses: whether QEMU is to go through the memory as few times as can be.
    init(mostSlowDown: Int, hasFewPasses: Bool) {
        self.mostSlowDown = mostSlowDown
        share = hasFewPasses ? 1 : 0.1
    }

    /// Takes a look.
    mutating func take(_ look: Look, now: ContinuousClock.Instant = .now) -> [Order] {
        // The guest is not paused for a destination that is away.
        gateIsOpen = !look.isAway && look.disksFit
        let orders = share(look, now) + judge(look)
        if rates.count == Self.looks { rates.removeFirst() }
        rates.append(look.rate)
        // QEMU reckons with whole pages.
        let allowed = gateIsOpen ? share * steadiness(look) / look.yield : 0
        guard (allowed == 0) != (told == 0) || abs(allowed - told) > told * Self.tellingChange else { return orders }
        told = allowed
        return [.gate(share: allowed)] + orders
    }

    /// What comes through, as a part of what QEMU reckons with at most.
    private func steadiness(_ look: Look) -> Double {
        guard look.steadyRate > 0, let most = rates.max(), most > look.steadyRate else { return 1 }
        return look.steadyRate / most
    }

    /// Whose the line is.
    private mutating func share(_ look: Look, _ now: ContinuousClock.Instant) -> [Order] {
        guard !look.isAway else {
            watched = nil
            return []
        }
        guard let (since, disks, fit) = watched, fit == look.disksFit else {
            watched = (now, look.disks, look.disksFit)
            return []
        }
        guard now - since >= Self.window else { return [] }
        watched = (now, look.disks, look.disksFit)
        switch (speed, fit) {
        case (.full, false) where Self.fellBehind(disks, look.disks) && look.rate > 0:
            speed = .limited(look.rate / 2, of: look.rate)
        case (.limited(let share, let whole), false)
        where Self.fellBehind(disks, look.disks) && share > whole * Self.leastShare:
            speed = .limited(max(share / 2, whole * Self.leastShare), of: whole)
        case (.limited(let share, let whole), true):
            speed = share * 1.25 < whole ? .limited(share * 1.25, of: whole) : .full
        default: return []
        }
        guard case .limited(let share, _) = speed else { return [.speed(nil)] }
        return [.speed(UInt64(max(share, 65_536)))]
    }

    /// A copy that gets on by itself needs no help.
    private static func fellBehind(_ before: UInt64, _ after: UInt64) -> Bool {
        Double(after) > Double(before) * 0.9
    }

    /// Whether what is left of the memory becomes less.
    private mutating func judge(_ look: Look) -> [Order] {
        guard gateIsOpen, look.rounds > round else { return [] }
        // The first look after QEMU has gone through the memory shows what the guest dirtied meanwhile.
        let shrank = Double(look.remaining) < Double(least) * 0.9
        let isFirst = round == 0
        idleRounds = shrank || round < 2 || share < 1 ? 0 : idleRounds + 1
        // A guest that now writes more and now less does not get on by that.
        if shrank { least = look.remaining }
        round = look.rounds
        if share < 1 {
            if isFirst { return [] }
            share = min(share * 2, 1)
            return []
        }
        if idleRounds >= Self.patience, !isThrottled, mostSlowDown > 0 {
            isThrottled = true
            idleRounds = 0
            return [.slowDown(percent: min(Self.throttle(look), mostSlowDown))]
        }
        return idleRounds >= Self.patienceWithThrottle ? [.giveUp] : []
    }

    /// How much of the guest's time has to go so that it changes its memory more slowly than that is sent, with something to spare.
    private static func throttle(_ look: Look) -> Int {
        guard look.dirtyRate > 0 else { return 20 }
        return Int(min(max(100 * (1 - 0.8 * look.memoryRate / look.dirtyRate), 20), 90))
    }
}
