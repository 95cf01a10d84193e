internal import FoundationEssentials
public import IO
public import Migration
public import TLS

/// What examines a host for somebody who is about to send guests to it.
///
/// - Parameters:
///   - examine: what is asked.
///   - peer: who asks.
///   - address: where the question comes from; nil when that is not known.
/// - Returns: what was found.
public typealias ExamineHost =
    @Sendable (_ examine: HostMessage.Examine, _ peer: TLSPeer, _ address: SocketAddress?) async -> [Finding]

/// The host looks at itself.
extension DestinationAgent {
    /// Answers EXAMINE: one of an identity after the other.
    func examine(
        _ examine: HostMessage.Examine,
        for peer: TLSPeer,
        at address: SocketAddress?,
        _ turn: KeyedSemaphore.Permit
    ) async -> HostMessage.Content {
        defer { turn.end() }
        guard let look = configuration.examineHost else { return .denied("This agent examines no hosts") }
        do { try await turn.wait() } catch { return .denied("\(error)") }
        let findings = await look(examine, peer, address)
        return .examined(.init(findings: findings, clock: Self.now, nbdPort: nbdPort))
    }
}
