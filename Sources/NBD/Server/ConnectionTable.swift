internal import IO

/// The connections of a server, and which of them have not negotiated yet.
///
/// Negotiation is where strangers are, so its places are few. When they are all taken, the oldest negotiation of the address
/// that has the most gives way to a new one: who connects and stays silent crowds out itself, and a good client, which needs
/// a place for milliseconds only, gets one.
final class ConnectionTable: Sendable {
    private struct Pending {
        let channel: any Channel
        let source: String
    }
    private struct State {
        var channels: [ObjectIdentifier: any Channel] = [:]
        /// Those that use an export.
        var settled: Set<ObjectIdentifier> = []
        /// In the order of their arrival.
        var pending: [Pending] = []
        var waiting: [UnsafeContinuation<Void, Never>] = []
    }
    private let state = Guarded(State())
    private let limits: NBDServer.Limits

    init(limits: NBDServer.Limits) { self.limits = limits }

    /// How many connections there are.
    var count: Int { state.withLock { $0.channels.count } }

    /// How many of them use an export.
    var settledCount: Int { state.withLock { $0.settled.count } }

    /// Adds a connection that begins to negotiate; false when there are too many that do more than that.
    func add(_ channel: any Channel) -> Bool {
        let source = Self.source(channel)
        let (isAdmitted, victim) = state.withLock { state -> (Bool, (any Channel)?) in
            if state.settled.count >= limits.connections { return (false, nil) }
            var victim: (any Channel)?
            if state.pending.count >= limits.negotiating {
                let index = Self.victim(state.pending)
                victim = state.pending.remove(at: index).channel
            }
            state.channels[ObjectIdentifier(channel)] = channel
            state.pending.append(Pending(channel: channel, source: source))
            return (true, victim)
        }
        victim?.abort(ChannelError(.timedOut, "Dropped a negotiation that made no haste while others waited"))
        return isAdmitted
    }

    private static func source(_ channel: any Channel) -> String {
        channel.peerAddress?.host ?? "local"
    }

    private static func victim(_ pending: [Pending]) -> Int {
        var counts: [String: Int] = [:]
        for entry in pending { counts[entry.source, default: 0] += 1 }
        let most = counts.values.max() ?? 0
        return pending.firstIndex { counts[$0.source] == most } ?? 0
    }

    /// The connection has negotiated; false when it has just given way to another, or there are too many.
    func settle(_ channel: any Channel) -> Bool {
        state.withLock { state in
            guard state.settled.count < limits.connections,
                let index = state.pending.firstIndex(where: { $0.channel === channel })
            else { return false }
            state.pending.remove(at: index)
            state.settled.insert(ObjectIdentifier(channel))
            return true
        }
    }

    func remove(_ channel: any Channel) {
        let waiting = state.withLock { state in
            state.channels[ObjectIdentifier(channel)] = nil
            state.pending.removeAll { $0.channel === channel }
            state.settled.remove(ObjectIdentifier(channel))
            guard state.channels.isEmpty else { return [UnsafeContinuation<Void, Never>]() }
            defer { state.waiting = [] }
            return state.waiting
        }
        for continuation in waiting { continuation.resume() }
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
