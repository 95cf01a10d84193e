internal import IO

/// The connections of a server: which of them have not negotiated yet, and how many each peer has of the others.
final class ConnectionTable: Sendable {
    private struct State {
        var channels: [ObjectIdentifier: any Channel] = [:]
        /// Those that use an export, with the name of the peer if it has one.
        var settled: [ObjectIdentifier: String?] = [:]
        /// How many of them each name has.
        var counts: [String: Int] = [:]
        /// What the requests of each name hold.
        var accounts: [String: PayloadAccount] = [:]
        /// Negotiation is where strangers are.
        var pending: UnprovenConnections
        var waiting: [UnsafeContinuation<Void, Never>] = []
        /// How many that used an export have gone, and who waits for the next one.
        var departures: UInt64 = 0
        var hopeful: [UInt64: UnsafeContinuation<Void, Never>] = [:]
        var latestHopeful: UInt64 = 0
    }
    private let state: Guarded<State>
    private let limits: NBDServer.Limits

    init(limits: NBDServer.Limits) {
        self.limits = limits
        state = Guarded(State(pending: UnprovenConnections(limit: limits.negotiating)))
    }

    /// How many connections there are.
    var count: Int { state.withLock { $0.channels.count } }

    /// How many of them use an export.
    var settledCount: Int { state.withLock { $0.settled.count } }

    /// Adds a connection that begins to negotiate; false when there are too many that do more than that.
    func add(_ channel: any Channel) -> Bool {
        let (isAdmitted, victim) = state.withLock { state -> (Bool, (any Channel)?) in
            if limits.patience == .zero, state.settled.count >= limits.connections { return (false, nil) }
            state.channels[ObjectIdentifier(channel)] = channel
            return (true, state.pending.add(channel))
        }
        victim?.abort(ChannelError(.timedOut, "Dropped a negotiation that made no haste while others waited"))
        return isAdmitted
    }

    /// The connection has negotiated.
    ///
    /// - Parameter peer: the name that it has proved; nil for one that has none.
    /// - Returns: why there is no place for it; nil when there is.
    func settle(_ channel: any Channel, for peer: String?) -> String? {
        state.withLock { state in
            guard state.settled.count < limits.connections else {
                return "The limit of \(limits.connections) connections to this server is reached"
            }
            if let peer, let most = limits.connectionsForPeer, state.counts[peer, default: 0] >= most {
                return "The limit of \(most) connections for one peer is reached"
            }
            guard state.pending.remove(channel) else { return "The negotiation has given way to another one" }
            state.settled[ObjectIdentifier(channel)] = .some(peer)
            if let peer {
                state.counts[peer, default: 0] += 1
                if let most = limits.payloadForPeer, state.accounts[peer] == nil {
                    state.accounts[peer] = PayloadAccount(limit: most)
                }
            }
            return nil
        }
    }

    /// What the requests of a settled connection's peer hold; nil when nobody counts.
    func account(of channel: any Channel) -> PayloadAccount? {
        state.withLock { state in (state.settled[ObjectIdentifier(channel)] ?? nil).flatMap { state.accounts[$0] } }
    }

    func remove(_ channel: any Channel) {
        let waiting = state.withLock { state in
            state.channels[ObjectIdentifier(channel)] = nil
            state.pending.remove(channel)
            var woken: [UnsafeContinuation<Void, Never>] = []
            if let settled = state.settled.removeValue(forKey: ObjectIdentifier(channel)) {
                if let peer = settled {
                    let rest = state.counts[peer, default: 1] - 1
                    state.counts[peer] = rest == 0 ? nil : rest
                    if rest == 0 { state.accounts[peer] = nil }
                }
                state.departures += 1
                woken = Array(state.hopeful.values)
                state.hopeful = [:]
            }
            guard state.channels.isEmpty else { return woken }
            defer { state.waiting = [] }
            return woken + state.waiting
        }
        for continuation in waiting { continuation.resume() }
    }

    /// How many connections that used an export have gone.
    var departures: UInt64 { state.withLock { $0.departures } }

    /// Returns when there were more departures than that, or the time is over. Called on the loop.
    func waitForDeparture(after known: UInt64, within limit: Duration, on loop: EventLoop) async {
        let number = state.withLock { state in
            state.latestHopeful += 1
            return state.latestHopeful
        }
        let timer = loop.schedule(after: limit) {
            self.state.withLock { $0.hopeful.removeValue(forKey: number) }?.resume()
        }
        await withUnsafeContinuation { continuation in
            let hasMissed = state.withLock { state in
                if state.departures > known { return true }
                state.hopeful[number] = continuation
                return false
            }
            if hasMissed { continuation.resume() }
        }
        timer.cancel()
    }

    func abortAll(_ reason: ChannelError) {
        for channel in state.withLock({ Array($0.channels.values) }) { channel.abort(reason) }
    }

    /// Returns when there is no connection.
    func waitUntilEmpty() async {
        await withUnsafeContinuation { continuation in
            let isEmpty = state.withLock { state in
                if state.channels.isEmpty { return true }
                state.waiting.append(continuation)
                return false
            }
            if isEmpty { continuation.resume() }
        }
    }
}
