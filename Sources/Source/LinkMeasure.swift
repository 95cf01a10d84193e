internal import Migration

/// What was measured between the agents.
struct LinkMeasure {
    /// There and back, in milliseconds.
    var roundTrip = 0.0
    /// Bytes per second of one connection.
    var rate = 0.0

    /// Bytes that a measurement sends.
    static let bytes = 512 << 10

    /// Bytes that a measurement sends at most when it is what was asked for.
    private static let mostBytes = 32 << 20

    /// Measures the way to a destination: the shortest of a few round trips, and the time that some data takes.
    ///
    /// - Parameters:
    ///   - control: a connection on which nothing was said yet.
    ///   - isThorough: whether more is sent, for a quarter of a second: what a line takes at once says little of what it carries.
    /// - Throws: `MigrationError` when the destination does not answer.
    static func take(over control: ControlConnection, isThorough: Bool = false) async throws -> LinkMeasure {
        var measure = LinkMeasure()
        measure.roundTrip = .infinity
        // On a long line one is as good as another, and each costs its time.
        for _ in 0..<3 where measure.roundTrip > 1000 || measure.roundTrip < 5 {
            let start = ContinuousClock.now
            guard case .probe = try await control.ask(.probe(0), timeout: .seconds(10)) else { throw noProbe }
            measure.roundTrip = min(measure.roundTrip, MigrationContext.milliseconds(ContinuousClock.now - start))
        }
        measure.rate = try await rate(of: bytes, measure.roundTrip, control)
        if isThorough, measure.rate > Double(4 * bytes) {
            measure.rate = try await rate(of: min(Int(measure.rate / 4), mostBytes), measure.roundTrip, control)
        }
        return measure
    }

    private static func rate(of bytes: Int, _ roundTrip: Double, _ control: ControlConnection) async throws -> Double {
        let piece = [UInt8](repeating: 0x5a, count: 64 << 10)
        let pieces = bytes / piece.count
        let start = ContinuousClock.now
        try await control.send(.probe(pieces * piece.count))
        for _ in 0..<pieces { try await control.send(data: piece) }
        guard case .probe = try await control.next(timeout: .seconds(30)) else { throw noProbe }
        let time = max(MigrationContext.milliseconds(ContinuousClock.now - start) - roundTrip, 0.05)
        return Double(pieces * piece.count) / time * 1000
    }

    private static var noProbe: MigrationError { MigrationError(.failed, "The destination does not answer PROBE") }
}
