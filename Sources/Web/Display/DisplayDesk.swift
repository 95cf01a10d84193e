internal import Emulator
internal import IO
internal import Migration

/// How the screen of a guest stands, as JSON.
struct DisplayStanding: Sendable, Hashable, Encodable {
    /// The guest.
    var guest: String
    /// Whether the guest has one here, now or in a moment.
    var exists: Bool
    /// Whether it can be had now.
    var available: Bool
    /// Why it cannot.
    var reason: String?
    /// How many look at it.
    var viewers: Int
    /// Whether whoever asks may do more than look.
    var mayWrite: Bool?
    /// Why browsers cannot show it; nil when they can.
    var browsers: String?
    /// Why the guest stands still until somebody does something; nil when nothing is known of that here.
    var trouble: GuestTrouble?

    private enum CodingKeys: String, CodingKey {
        case guest, exists, available, reason, viewers, browsers, trouble
        case mayWrite = "may_write"
    }
}

/// The screens of this host's guests, and who looks at them. Confined to its loop.
final class DisplayDesk: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// Between two looks at what viewers are to be told.
    private static let period = Duration.seconds(1)
    /// After how many of them it is looked at whether viewers may stay.
    private static let inspection = 5

    private let loop: EventLoop
    private let log: Log
    private let troubles: TroubleWatch
    private let source: (String) -> any DisplaySource
    /// What viewers of guests that leave share.
    let reserve = DisplayReserve()
    private var tunnels: [ObjectIdentifier: DisplayTunnel] = [:]
    /// What leads to the screens of guests that have gone; nothing without it.
    var passage: FollowingDisplay.Passage?
    private var sessions: [ObjectIdentifier: DisplaySession] = [:]
    private var timer: LoopTimer?
    private var looks = 0
    private var isOver = false

    init(stateDirectory: String, on loop: EventLoop, _ pool: BlockingPool, _ log: Log, _ troubles: TroubleWatch) {
        (self.loop, self.log, self.troubles) = (loop, log, troubles)
        let store = GuestStore(stateDirectory: stateDirectory)
        source = { LocalDisplay(guest: $0, store: store, pool: pool) }
    }

    /// The screen of a guest that is here.
    func local(_ guest: String) -> any DisplaySource { source(guest) }

    /// Where the screen of a guest is to be found, now and later.
    func source(of guest: String) -> any DisplaySource {
        guard let passage else { return source(guest) }
        return FollowingDisplay(guest: guest, local: source(guest), passage: passage)
    }

    /// Connects to the screen of a guest.
    ///
    /// - Throws: `HTTPFailure` that says why there is none.
    func open(_ source: any DisplaySource) async throws(HTTPFailure) -> DisplayConnection {
        do { return try await DisplayConnection.open(source, on: loop) } catch { throw Self.failure(error) }
    }

    /// How the screen of a guest stands.
    func standing(of guest: String) async -> DisplayStanding {
        let absence = await source(of: guest).absence()
        let trouble = await troubles.trouble(of: guest)
        let viewers = sessions.values.count { $0.guest == guest }
        return DisplayStanding(
            guest: guest,
            exists: absence?.mayPass ?? true,
            available: absence == nil,
            reason: absence.map { "\($0)" },
            viewers: viewers,
            trouble: trouble
        )
    }

    private static func failure(_ absence: DisplayAbsence) -> HTTPFailure {
        let sentence = "\(absence)".prefix(1).uppercased() + "\(absence)".dropFirst()
        return HTTPFailure(status: absence.mayPass ? 409 : 404, reason: sentence)
    }

    /// How many look.
    var count: Int { sessions.count }
    /// How many of them somebody has.
    func count(of visitor: String) -> Int { sessions.values.count { $0.visitor == visitor } }

    /// Serves a viewer until it goes.
    func serve(_ session: DisplaySession) async {
        sessions[ObjectIdentifier(session)] = session
        if isOver { session.end(.closed("the agent ends")) }
        watch()
        await session.serve()
        sessions[ObjectIdentifier(session)] = nil
    }

    /// Passes a display on to another host's agent until one of the two ends.
    ///
    /// - Parameters:
    ///   - guest: whose it is.
    ///   - display: the display.
    ///   - agent: what leads to the agent.
    ///   - mayStay: whether it still may have it.
    func pass(
        _ guest: String,
        _ display: any Channel,
        to agent: any Channel,
        mayStay: @escaping @Sendable () -> Bool
    ) async {
        let tunnel = DisplayTunnel(guest, agent, display, reserve: reserve, mayStay: mayStay)
        tunnels[ObjectIdentifier(tunnel)] = tunnel
        if isOver { tunnel.end() }
        await tunnel.run()
        tunnels[ObjectIdentifier(tunnel)] = nil
    }

    private func watch() {
        guard timer == nil, !isOver else { return }
        timer = loop.schedule(after: Self.period) { [weak self] in
            guard let self else { return }
            timer = nil
            looks += 1
            if looks.isMultiple(of: Self.inspection) {
                for session in sessions.values where !session.mayStay() { session.end(nil) }
            }
            Task(executorPreference: loop) {
                await self.explainTroubles()
                if !self.sessions.isEmpty { self.watch() }
            }
        }
    }

    /// Tells viewers why their guests stand still.
    private func explainTroubles() async {
        for guest in Set(sessions.values.map(\.guest)) {
            let trouble = await troubles.trouble(of: guest)
            for session in sessions.values where session.guest == guest { session.explain(trouble) }
        }
    }

    /// A guest is about to be paused, to go on elsewhere. Returns when it holds nothing down any more that its viewers have pressed.
    func warn(_ guest: String) async {
        for tunnel in tunnels.values where tunnel.guest == guest { tunnel.warn() }
        for session in sessions.values where session.guest == guest { await session.warn() }
    }

    /// Ends it for all.
    func stop() {
        isOver = true
        timer?.cancel()
        for session in sessions.values { session.end(.closed("the agent ends")) }
        for tunnel in tunnels.values { tunnel.end() }
    }
}
