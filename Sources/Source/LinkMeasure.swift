internal import Migration

/// What was measured between the agents.
struct LinkMeasure: Sendable {
    /// There and back, in milliseconds.
    var roundTrip = 0.0
    /// Bytes per second of one connection.
    var rate = 0.0

    /// Bytes that a measurement sends.
    static let bytes = 512 << 10

    /// Bytes that a measurement sends at most when it is what was asked for.
    private static let mostBytes = 32 << 20

    /// What a measurement takes at least, in milliseconds: no connection carries so much faster, and what a line's buffers take at once says no more.
    private static let leastTime = 0.25

    /// Round trips from which a question is worth asking before the answer to the one before has come, in milliseconds.
    static let longLine = 5.0

    /// A measurement whose answers are still on their way.
    struct Probe {
        /// Where the answers come; nil when they are known.
        private let control: ControlConnection?
        private let began = ContinuousClock.now
        private let result: LinkMeasure

        /// One that is over.
        init(_ result: LinkMeasure) {
            self.result = result
            control = nil
        }

        /// One that begins.
        fileprivate init(over control: ControlConnection) {
            self.control = control
            result = LinkMeasure()
        }

        /// What was measured. To be asked for before the answer to anything that was said since.
        ///
        /// - Throws: `MigrationError` when the destination does not answer.
        func measure() async throws -> LinkMeasure {
            guard let control else { return result }
            guard case .probe = try await control.next(timeout: .seconds(30)) else { throw noProbe }
            let roundTrip = MigrationContext.milliseconds(control.arrival - began)
            guard case .probe = try await control.next(timeout: .seconds(30)) else { throw noProbe }
            let time = max(MigrationContext.milliseconds(control.arrival - began) - roundTrip, leastTime)
            return LinkMeasure(roundTrip: roundTrip, rate: Double(bytes) / time * 1000)
        }
    }

    /// Begins a measurement. On a long line what is said next need not wait for its end.
    ///
    /// - Throws: as `take`.
    static func begin(over control: ControlConnection, isThorough: Bool) async throws -> Probe {
        guard control.isFar, !isThorough else {
            return Probe(try await take(over: control, isThorough: isThorough))
        }
        let probe = Probe(over: control)
        try await control.send(.probe(0))
        try await send(bytes, over: control)
        return probe
    }

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
        for _ in 0..<3 where measure.roundTrip > 1000 || measure.roundTrip < longLine {
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
        let start = ContinuousClock.now
        let sent = try await send(bytes, over: control)
        guard case .probe = try await control.next(timeout: .seconds(30)) else { throw noProbe }
        let time = max(MigrationContext.milliseconds(ContinuousClock.now - start) - roundTrip, leastTime)
        return Double(sent) / time * 1000
    }

    @discardableResult
    private static func send(_ bytes: Int, over control: ControlConnection) async throws -> Int {
        let piece = [UInt8](repeating: 0x5a, count: 64 << 10)
        let pieces = bytes / piece.count
        try await control.send(.probe(pieces * piece.count))
        for _ in 0..<pieces { try await control.send(data: piece) }
        return pieces * piece.count
    }

    private static var noProbe: MigrationError { MigrationError(.failed, "The destination does not answer PROBE") }
}
