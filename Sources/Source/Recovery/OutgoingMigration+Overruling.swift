internal import Emulator
internal import IO
internal import Migration

/// What the two hosts tell each other when an operator has decided without one of them.
extension OutgoingMigration {
    /// What the destination is told that the guest was released to when an operator asks it.
    var inquiredRelease: Message.Release { .init(digests: fullDigests) }

    /// Asks the destination at every address that it has.
    func inquire() async throws -> DestinationInquiry {
        try await loop.run {
            try await DestinationInquiry.ask(
                self.plan,
                release: self.inquiredRelease,
                credentials: self.credentials,
                on: self.loop
            )
        }
    }

    /// Tells the destination that an operator has taken the guest for this host. It is asked once: it may be away for good.
    ///
    /// - Parameter operatorName: who has taken it.
    /// - Returns: whether it knows, or has nothing to know.
    func tellOverruling(by operatorName: String) async -> Bool {
        let opened: (ControlConnection, Message.Welcome)
        do { opened = try await ControlConnection.open(plan, credentials: credentials, on: loop) } catch {
            warn(
                "\(plan.host) does not know yet that guest '\(plan.guest)' was taken from it: \(error). 'crossdock recover "
                    + "\(plan.id)' tells it once it is there"
            )
            return false
        }
        let (control, welcome) = opened
        defer { control.close() }
        if let other = welcome.takenBy {
            warn(
                "Guest '\(plan.guest)' was taken twice: for this host by \(operatorName), and for \(plan.host) by \(other). Both may "
                    + "run it: end the one that shall not go on, here with 'crossdock guest stop \(plan.guest)'"
            )
            return false
        }
        switch welcome.state {
        case .new, .aborted: return true
        case .offered, .prepared: break
        case .owner, .done:
            warn(
                "\(plan.host) took guest '\(plan.guest)' over before it could be told that \(operatorName) has taken it for this "
                    + "host. Both may run it: end the one that shall not go on, here with 'crossdock guest stop \(plan.guest)'"
            )
        }
        if Feature.known(welcome.features).contains(.overruling) {
            return await answers(.overruled(operatorName), control) {
                if case .overruled = $0 { true } else { false }
            }
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
        warn(
            "\(plan.host) did not confirm that guest '\(plan.guest)' was taken from it; 'crossdock recover \(plan.id)' tells it again"
        )
        return false
    }

    /// An operator of the destination has taken the guest: it must not run here any more, and what runs is for people to end.
    func learnOverruling(by operatorName: String) async {
        guard overruledBy == nil else { return }
        overruledBy = operatorName
        await decide(.overruled(by: operatorName))
        var reason = "Guest '\(plan.guest)' belongs to \(plan.host) by the word of \(operatorName)"
        report.code = 0
        if let process = record?.process, process.isRunning {
            report.code = MigrationError.Code.undecided.rawValue
            let status = monitor?.isConnected == true ? try? await monitor?.status() : nil
            reason +=
                status == nil || status == "running"
                ? ", and its QEMU runs here too, as process \(process.pid): both hosts may run it. End the one that shall not go "
                    + "on, here with 'crossdock guest stop \(plan.guest)'"
                : "; its QEMU is still here, paused, as process \(process.pid): 'crossdock guest stop \(plan.guest)' ends it"
        }
        report.outcome = .overruled
        report.reason = reason
        warn(reason)
    }

    /// What is said while a destination that the guest was released to does not answer.
    func waitingSentence(_ error: any Error) -> String {
        "Guest '\(plan.guest)' was released to \(plan.host), which has not confirmed yet: \(error). It must not be started here; "
            + "trying again. If \(plan.host) is gone for good: 'crossdock recover \(plan.id) --take-ownership'"
    }

    /// Lets a QEMU go on that was frozen for the release. The guest belongs to this host, and its images have their names.
    func thawEmulator() { record?.process?.thaw() }
}
