internal import Emulator
internal import IO
internal import Migration

/// What an operator decides when the other host cannot be asked, and how each host learns of it.
extension OutgoingMigration {
    /// Asks the destination at every address that it has.
    func inquire() async throws -> DestinationInquiry {
        try await context.loop.run {
            try await DestinationInquiry.ask(
                self.plan,
                release: .init(runState: Self.noted(self.context.files)),
                credentials: self.context.credentials,
                on: self.context.loop
            )
        }
    }

    /// Tells the destination that the guest was taken from it, if it is there. Who takes a guest for this host does not wait for
    /// the other one.
    ///
    /// - Parameter operatorName: who has taken it.
    /// - Returns: whether it knows, or has nothing to know.
    func tellOverruling(by operatorName: String) async -> Bool {
        let opened: (ControlConnection, Message.Welcome)
        do {
            opened = try await ControlConnection.open(plan, credentials: context.credentials, on: context.loop)
        } catch {
            context.warn(
                "\(plan.host) does not know yet that guest '\(plan.guest)' was taken from it: \(error). 'crossdock recover "
                    + "\(plan.id)' tells it once it is there"
            )
            return false
        }
        let (control, welcome) = opened
        defer { control.close() }
        let bothMayRun =
            "Both may run it: end the one that shall not go on, here with 'crossdock guest stop \(plan.guest)'"
        if let other = welcome.takenBy {
            mayRunTwice = true
            context.warn(
                "Guest '\(plan.guest)' was taken twice: for this host by \(operatorName), and for \(plan.host) by "
                    + "\(MigrationContext.said(other)). \(bothMayRun)"
            )
            return false
        }
        switch welcome.state {
        case .new, .aborted: return true
        case .offered, .prepared: break
        case .owner, .done:
            mayRunTwice = true
            context.warn(
                "\(plan.host) took guest '\(plan.guest)' over before it could be told that \(operatorName) has taken it for this "
                    + "host. \(bothMayRun)"
            )
        }
        if Feature.known(welcome.features).contains(.overruling) {
            return await answers(.overruled(operatorName), control) { if case .overruled = $0 { true } else { false } }
        }
        // An agent that does not know the word gives up a guest that was never released to it.
        guard welcome.state == .offered || welcome.state == .prepared else { return false }
        return await answers(.abort("\(operatorName) has taken the guest for its source"), control) {
            if case .abort = $0 { true } else { false }
        }
    }

    private func answers(
        _ message: Message,
        _ control: ControlConnection,
        _ isAnswer: (Message) -> Bool
    ) async -> Bool {
        try? await control.send(message)
        while let answer = try? await control.next(timeout: .seconds(10)) { if isAnswer(answer) { return true } }
        context.warn(
            "\(plan.host) did not confirm that guest '\(plan.guest)' was taken from it; 'crossdock recover \(plan.id)' tells it again"
        )
        return false
    }

    /// An operator of the destination has taken the guest: from here on it must not run here.
    func learnOverruling(_ operatorName: String) async {
        let by = MigrationContext.said(operatorName)
        do { try await journal?.write(.overruled(by: by)) } catch { context.warn("\(error)") }
        var reason = "Guest '\(plan.guest)' belongs to \(plan.host) by the word of \(by)"
        context.report.code = 0
        if let process = record?.process, process.isRunning {
            context.report.code = MigrationError.Code.undecided.rawValue
            var state: RunState?
            if let monitor, monitor.isConnected, !process.isFrozen { state = try? await monitor.runState() }
            let mayRun = !process.isFrozen && (state == nil || state == .running)
            reason +=
                mayRun
                ? ", and its QEMU runs here too, as process \(process.pid): both hosts may run it. End the one that shall not go on, "
                    + "here with 'crossdock guest stop \(plan.guest)'"
                : "; its QEMU is still here, paused, as process \(process.pid): 'crossdock guest stop \(plan.guest)' ends it"
        }
        context.report.outcome = .overruled
        context.report.reason = reason
        context.warn(reason)
    }
}
