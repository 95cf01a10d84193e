public import IO

/// One thing that a server must do.
public struct ConformanceCase: Sendable {
    /// The name, stable over versions: `T-5.unknown-options`.
    public let name: String
    /// The section of the NBD specification (`doc/proto.md`) that says so.
    public let section: String
    /// What must be, as a sentence.
    public let rule: String
    let body: @Sendable (ConformanceContext) async throws -> Void

    init(
        _ name: String,
        _ section: String,
        _ rule: String,
        _ body: @escaping @Sendable (ConformanceContext) async throws -> Void
    ) {
        self.name = name
        self.section = section
        self.rule = rule
        self.body = body
    }
}

/// What a case works with.
struct ConformanceContext: Sendable {
    let target: ConformanceTarget
    let loop: EventLoop
    /// What is open, to be ended when a case takes too long. Confined to the loop.
    let open = OpenChannels()

    final class OpenChannels: @unchecked Sendable {
        // Unchecked: confined to the loop.
        var channels: [any Channel] = []
        var isLate = false
    }

    /// Makes a connection and closes it afterwards.
    func connect(_ body: (ConformanceProbe) async throws -> Void) async throws {
        guard !open.isLate else { throw ConformanceFailure(text: "it took too long") }
        let probe = try await ConformanceProbe.connect(target, on: loop)
        let channel = probe.channel
        open.channels.append(channel)
        defer {
            open.channels.removeAll { $0 === channel }
            probe.close()
        }
        try await body(probe)
    }

    func require(_ condition: Bool, _ text: String) throws {
        guard condition else { throw ConformanceFailure(text: text) }
    }

    func skip(unless condition: Bool, _ text: String) throws {
        guard condition else { throw ConformanceFailure(text: text, isSkip: true) }
    }
}

/// How a case ended.
public struct ConformanceVerdict: Sendable {
    /// The three ends.
    public enum Outcome: String, Sendable {
        /// The server did as it must.
        case pass
        /// It did not.
        case fail
        /// The case does not apply to this server.
        case skip
    }
    /// The case.
    public let conformanceCase: ConformanceCase
    /// How it ended.
    public let outcome: Outcome
    /// What the server did instead, or why the case does not apply.
    public let detail: String
}

/// Judges NBD servers: plays a client that is sometimes correct and sometimes hostile, and looks at what the server does.
public enum Conformance {
    /// All cases, in the order of the checklist.
    public static var cases: [ConformanceCase] {
        handshakeCases + tlsCases + optionCases + transmissionCases + writeCases + extendedCases
    }

    /// Runs cases one after the other, each on connections of its own and for at most 30 seconds.
    ///
    /// - Parameters:
    ///   - target: the server.
    ///   - filter: the cases whose name this accepts.
    ///   - loop: where the connections live.
    ///   - report: gets each verdict when it is there.
    /// - Throws: `ChannelError` when the server cannot be reached at all.
    public static func run(
        against target: ConformanceTarget,
        where filter: (String) -> Bool = { _ in true },
        on loop: EventLoop,
        report: (ConformanceVerdict) -> Void
    ) async throws {
        (try await ConformanceProbe.connect(target, on: loop)).close()
        for one in cases where filter(one.name) {
            let context = ConformanceContext(target: target, loop: loop)
            let timer = loop.schedule(after: .seconds(target.isPatient ? 90 : 30)) {
                context.open.isLate = true
                for channel in context.open.channels {
                    channel.abort(ChannelError(.timedOut, "The server said nothing for too long"))
                }
            }
            defer { timer.cancel() }
            let verdict: ConformanceVerdict
            do {
                try await one.body(context)
                verdict = ConformanceVerdict(conformanceCase: one, outcome: .pass, detail: "")
            } catch let failure as ConformanceFailure {
                verdict = ConformanceVerdict(
                    conformanceCase: one,
                    outcome: failure.isSkip ? .skip : .fail,
                    detail: failure.text
                )
            } catch {
                verdict = ConformanceVerdict(conformanceCase: one, outcome: .fail, detail: "\(error)")
            }
            report(verdict)
        }
    }
}
