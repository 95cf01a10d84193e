import IO
import Source
import TLS
import TestSupport
import Testing

/// How another host looks, by its real agent.
@Suite(.timeLimit(.minutes(3)))
struct PeerProbeEndToEnd {
    @Test func anAgentAnswersWithItsClockAndHasNothingToLog() async throws {
        let lab = try Lab()
        let port = try await lab.startDestination("b")
        let before = lab.destinationErrors()
        let probe = await PeerProbe.look(at: "localhost", port: port, try lab.pki.credentials(.client), on: lab.loop)
        #expect(probe.error == nil && probe.roundTripMS.map { $0 > 0 && $0 < 5000 } == true, "\(probe)")
        #expect(probe.clockOffsetMS.map { abs($0) < 1000 } == true, "\(probe)")
        // Another one is served after it: what the first one left would have been logged by now.
        _ = await PeerProbe.look(at: "localhost", port: port, try lab.pki.credentials(.client), on: lab.loop)
        #expect(lab.destinationErrors() == before)
        lab.stopDestination("b")
        let gone = await PeerProbe.look(at: "localhost", port: port, try lab.pki.credentials(.client), on: lab.loop)
        #expect(gone.error?.isEmpty == false && gone.roundTripMS == nil, "\(gone)")
    }
}
