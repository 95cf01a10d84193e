internal import FoundationEssentials
public import IO
internal import Migration
public import TLS

/// How another host of the fleet looks from here, as its agent answers.
public struct PeerProbe: Sendable, Hashable {
    /// There and back, in milliseconds; nil when it did not answer.
    public private(set) var roundTripMS: Double?
    /// How far its clock is ahead, in milliseconds, to within half a round trip; nil when it does not tell.
    public private(set) var clockOffsetMS: Double?
    /// Why it did not answer; nil when it did.
    public private(set) var error: String?

    /// Connects, asks, and says good-bye.
    ///
    /// - Parameters:
    ///   - host: the host, for which its agent's certificate must be.
    ///   - port: the control port of its agent.
    ///   - credentials: a client's.
    ///   - loop: where the connection lives.
    public static func look(
        at host: String,
        port: UInt16,
        _ credentials: any TLSCredentials,
        on loop: EventLoop
    ) async -> PeerProbe {
        var probe = PeerProbe()
        let target = TargetHost(
            host: host,
            port: port,
            evacuation: MigrationStore.makeID(),
            credentials: credentials,
            on: loop
        )
        do {
            // An agent of an earlier release answers nothing more.
            guard try await target.connect().contains(.evacuation) else {
                await target.leave()
                return probe
            }
            // Room that was never reserved is given back at once, which is what a word costs there and back.
            let asked = ContinuousClock.now
            try await target.release("0")
            probe.roundTripMS = Self.milliseconds(.now - asked)
            let before = Date.now.timeIntervalSince1970
            if let clock = try await target.state()?.clock {
                let middle = (before + Date.now.timeIntervalSince1970) / 2
                probe.clockOffsetMS = min(max(Double(clock) - middle * 1000, -1e15), 1e15)
            }
        } catch { probe.error = "\(error)".shown(most: 500) }
        await target.leave()
        return probe
    }

    private static func milliseconds(_ time: Duration) -> Double {
        Double(time.components.seconds) * 1000 + Double(time.components.attoseconds) / 1e15
    }
}
