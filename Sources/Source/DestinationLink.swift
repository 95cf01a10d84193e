internal import IO
internal import Migration
internal import TLS

/// The conversation with the destination agent, over one connection after another.
///
/// Until READY a lost connection ends the migration; from then on it is made again for as long as the operator's patience lasts,
/// and what was asked is asked again: each message may be said twice. Confined to the control loop.
final class DestinationLink: @unchecked Sendable {
    // Unchecked: confined to the control loop.
    private let context: MigrationContext
    private var plan: MigrationPlan { context.plan }
    private var loop: EventLoop { context.loop }
    private(set) var control: ControlConnection?
    /// What the destination can do.
    private(set) var features: Set<Feature> = []
    /// Its NBD server's port, as it said last.
    private(set) var nbdPort: UInt16 = 0
    /// Whether a lost connection is made again.
    var isResumable = false
    private(set) var isReconnecting = false
    private var isInterruptible = true
    /// Whether the destination was asked to prepare: before that nobody can have taken the guest for it.
    var mayBePrepared: () -> Bool = { true }
    /// The values of the guest's secrets: a destination agent keeps them in memory only, so each new one has to be told.
    var secrets: [String: SecretBytes] = [:]
    /// Is told how far the destination is with reading back the disks.
    var onReadBack: ((Message.ReadBack) -> Void)?
    /// Is told where the NBD server is when another connection was made.
    var onReconnect: ((SocketAddress) -> Void)?

    init(_ context: MigrationContext) { self.context = context }

    // MARK: connections

    /// Connects for the first time.
    func open() async throws {
        let welcome = try await connect()
        guard welcome.state == .new else {
            throw MigrationError(
                .refused,
                "The destination is in the state '\(welcome.state.rawValue)' of this migration already"
            )
        }
        if let control { watch(control) }
    }

    private func connect() async throws -> Message.Welcome {
        let (next, welcome) = try await ControlConnection.open(plan, credentials: context.credentials, on: loop)
        control = next
        features = Feature.known(welcome.features)
        nbdPort = welcome.nbdPort
        return welcome
    }

    private func watch(_ control: ControlConnection) {
        control.onReadBack = { [weak self] in self?.onReadBack?($0) }
        control.onFailure = { [weak self, unowned control] error in
            guard let self else { return }
            guard self.isResumable, control.isLost, self.context.mayBeInterrupted(), self.context.fault == nil else {
                return self.context.fail(error)
            }
            self.reconnect(error)
        }
    }

    /// The link may come back, and the destination's agent: the guest runs on meanwhile.
    private func reconnect(_ error: MigrationError) {
        guard !isReconnecting else { return }
        isReconnecting = true
        context.warn("\(error.message). The guest stays here meanwhile; trying again for \(plan.patience) s")
        Task(executorPreference: loop) {
            defer {
                self.isReconnecting = false
                self.context.wake()
            }
            var last = error
            // An attempt that has begun may take longer than there is patience for.
            let end = self.loop.schedule(after: .seconds(self.plan.patience)) {
                self.context.fail(
                    MigrationError(
                        .failed,
                        "\(self.plan.host) was lost and could not be reached again within \(self.plan.patience) s: \(last.message)"
                    )
                )
            }
            defer { end.cancel() }
            var pause = Duration.milliseconds(100)
            while self.context.fault == nil, self.context.mayBeInterrupted() {
                do {
                    return try await self.connectAgain()
                } catch let error as MigrationError {
                    last = error
                    // A handshake that was damaged on the way looks like one that was refused, but does not stay.
                    // An agent that has just been started may refuse for a moment.
                    if ![.unreachable, .security, .refused].contains(error.code) { return self.context.fail(error) }
                } catch { last = MigrationError(.failed, "\(error)") }
                await self.loop.sleep(for: pause)
                pause = min(pause * 2, .seconds(1))
            }
        }
    }

    private func connectAgain() async throws {
        let (next, welcome) = try await ControlConnection.open(plan, credentials: context.credentials, on: loop)
        guard context.fault == nil, context.mayBeInterrupted() else { return next.close() }
        guard welcome.state == .offered || welcome.state == .prepared else {
            next.close()
            if let by = welcome.takenBy, mayBePrepared() { throw Self.overruled(plan, by) }
            throw MigrationError(.failed, "The destination has given the migration up meanwhile")
        }
        do { try await sendSecrets(next) } catch {
            next.close()
            throw MigrationError(.unreachable, "\(error)")
        }
        context.report.reconnects += 1
        control = next
        features = Feature.known(welcome.features)
        watch(next)
        // It may have been lost before anybody watched it.
        if let failure = next.failure { throw MigrationError(.unreachable, failure.message) }
        onReconnect?(plan.address.with(port: welcome.nbdPort))
        context.warn("Connected to \(plan.host) again")
    }

    /// What is wrong with an answer that is none to the question.
    func unexpected(_ answer: Message, to question: Message) -> MigrationError {
        switch answer {
        case .refused(let reason):
            MigrationError(.failed, "\(plan.host) refuses \(question.name): \(MigrationContext.said(reason))")
        // Before that nobody can have taken the guest, whatever the destination says.
        case .overruled(let by) where mayBePrepared(): Self.overruled(plan, by)
        default: MigrationError(.failed, "\(plan.host) answered \(question.name) with \(answer.name)")
        }
    }

    static func overruled(_ plan: MigrationPlan, _ by: String) -> MigrationError {
        MigrationError(
            .failed,
            "Guest '\(plan.guest)' was taken for \(plan.host) by \(MigrationContext.said(by)), without this host's word"
        )
    }

    /// The connection, once there is one.
    func connection() async throws -> ControlConnection {
        while true {
            try context.check()
            if let control, control.failure == nil { return control }
            guard isReconnecting else {
                throw control?.failure ?? MigrationError(.failed, "There is no connection")
            }
            await context.waitForChange()
        }
    }

    private func sendSecrets(_ control: ControlConnection) async throws {
        if secrets.isEmpty { return }
        try await control.send(.secrets(secrets.mapValues { $0.withBytes { Base64.encode($0) } }))
    }

    func sendSecrets() async throws { try await sendSecrets(try await connection()) }

    // MARK: questions

    /// Sends a message and waits for its answer, again when the connection is lost meanwhile: each may be said twice. One that can be
    /// reached again and again, and answers never, is left.
    func ask(_ message: Message, timeout: Duration) async throws -> Message {
        let end = ContinuousClock.now + timeout + .seconds(plan.patience)
        while true {
            let control = try await connection()
            do {
                return try await control.ask(message, timeout: timeout)
            } catch let error as MigrationError {
                try context.checkFault()
                guard control.isLost, isResumable, ContinuousClock.now < end else { throw error }
            }
        }
    }

    /// A reason to stop ends a wait for an answer from now on.
    func interrupt(_ error: MigrationError) { if isInterruptible { control?.interruption = error } }

    /// What is asked from now on is waited for, whatever happens.
    func shield() {
        isInterruptible = false
        isResumable = false
        control?.interruption = nil
    }

    /// Says RELEASE until the destination has said what becomes of the guest.
    ///
    /// - Parameters:
    ///   - release: the message.
    ///   - patience: how long one attempt may take.
    ///   - silence: is told of each attempt that brought no answer.
    /// - Returns: OWNED or REFUSED.
    func release(
        _ release: Message.Release,
        patience: Duration,
        silence: (any Error) async -> Void
    ) async -> Message {
        var delay = Duration.milliseconds(100)
        while true {
            do {
                if control == nil || control?.failure != nil {
                    context.report.reconnects += 1
                    _ = try await connect()
                }
                guard let control else { continue }
                let answer = try await control.ask(.release(release), timeout: patience)
                switch answer {
                case .owned, .refused: return answer
                case .abort(let reason):
                    throw MigrationError(.undecided, "it does not say whose it is: \(MigrationContext.said(reason))")
                default: throw MigrationError(.undecided, "it answered RELEASE with \(answer.name)")
                }
            } catch {
                await silence(error)
                control?.close()
                await loop.sleep(for: delay)
                delay = min(delay * 2, .seconds(10))
            }
        }
    }

    /// What a destination says to ABORT.
    enum Farewell {
        /// It has given the migration up, or never had it; with what it knows of why, when that is more than it was told.
        case acknowledged(words: String? = nil)
        /// It could not be reached.
        case silent
        /// An operator has taken the guest for it.
        case overruled(by: String)
    }

    /// Says ABORT, over a new connection if need be.
    ///
    /// - Parameter patience: how long new connections are tried; nil for the one that there is.
    func tell(_ reason: String, patience: Duration?) async -> Farewell {
        // Its answer is no failure, and is waited for although there is a reason to stop.
        control?.onFailure = nil
        control?.interruption = nil
        let last = control
        if let control, control.failure == nil {
            try? await control.send(.abort(reason))
            // Answers to what was asked before may still be on their way.
            while let answer = try? await control.next(timeout: .seconds(10)) {
                if case .abort(let words) = answer { return Self.acknowledged([words], reason) }
            }
        }
        guard let patience else { return .silent }
        let end = ContinuousClock.now + patience
        while ContinuousClock.now < end {
            if let (control, welcome) = try? await ControlConnection.open(
                plan,
                credentials: context.credentials,
                on: loop
            ) {
                defer { control.close() }
                // It has never heard of this migration, and cannot become the owner.
                if welcome.state == .new { return Self.acknowledged([last?.lastWords], reason) }
                if let by = welcome.takenBy { return .overruled(by: by) }
                try? await control.send(.abort(reason))
                if let answer = try? await control.next(timeout: .seconds(5)), case .abort(let words) = answer {
                    return Self.acknowledged([words, last?.lastWords], reason)
                }
            }
            await loop.sleep(for: .milliseconds(500))
        }
        return .silent
    }

    /// Most destinations repeat what they were told, and of some it is known already why they gave up.
    private static func acknowledged(_ words: [String?], _ reason: String) -> Farewell {
        .acknowledged(
            words: words.compactMap(\.self).first { !$0.hasPrefix(reason.prefix(60)) && !reason.contains($0) }
        )
    }

    func close() {
        control?.close()
        secrets = [:]
    }
}
