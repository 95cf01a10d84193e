internal import Emulator
internal import IO
internal import Migration
internal import TLS

/// What this host's agent has to do with the guest's consoles, and what becomes of them when the guest has gone.
extension OutgoingMigration {
    /// How long the agent may take: whatever it knows, the guest runs on its new host by now.
    private static let patience = Duration.seconds(3)

    /// Tells the new host what this one's agent will show for the guest's consoles, and what was written to the serial one last; notes where the
    /// guest has gone. All of it is a convenience: nothing waits for an answer, and what fails is left out.
    func handOverConsoles() async {
        guard let control = link.control else { return }
        if link.features.contains(.consoleRelays) {
            let grant = ConsoleGrant()
            let departure = ConsoleDeparture(
                guest: plan.guest,
                host: plan.host,
                port: plan.port,
                identity: control.session.peer.name,
                grant: grant
            )
            do {
                try await control.send(.grant(ConsoleGranting(grant)))
                let directory = plan.stateDirectory
                try await BlockingPool.shared.run { try departure.write(stateDirectory: directory) }
            } catch { context.warn("The consoles of guest '\(plan.guest)' end here: \(error)") }
        } else {
            // What an earlier move has left would lead to where the guest is not.
            ConsoleDeparture.remove(plan.guest, stateDirectory: plan.stateDirectory)
        }
        if let tail = await consoleTail() { try? await control.send(.console(tail)) }
    }

    /// The end of what was written; nil when the agent does not hold the console, or the other side does not take it.
    private func consoleTail() async -> ConsoleTail? {
        guard link.features.contains(.consoles), record?.placement?.console != nil else { return nil }
        let identity = link.control?.session.peer.name ?? ""
        let answer = await askAgent("console-tail", ["guest": .string(plan.guest), "identity": .string(identity)])
        return answer.flatMap { JSONText.decode(ConsoleTail.self, from: Array($0.text.utf8)) }
    }

    /// Tells this host's agent that the guest has gone, which it would find out by itself a moment later.
    func tellConsoles() async {
        let identity = link.control?.session.peer.name ?? ""
        _ = await askAgent("console-left", ["guest": .string(plan.guest), "identity": .string(identity)])
    }

    /// What is typed in the pause waits for the guest's new host, or for its end: what QEMU takes here now may not come along. Nothing waits for it.
    func keepConsoleStill(_ still: Bool) {
        guard record?.placement?.console != nil else { return }
        Task(executorPreference: context.loop) {
            _ = await self.askAgent("console-still", ["guest": .string(self.plan.guest), "still": .bool(still)])
        }
    }

    private func askAgent(_ command: String, _ arguments: JSONValue) async -> JSONValue? {
        let path = "\(plan.stateDirectory)/control.sock"
        guard
            let agent = try? await QMPClient.connect(to: path, on: context.loop, timeout: Self.patience)
        else { return nil }
        defer { agent.close() }
        return try? await agent.execute(command, arguments, timeout: Self.patience)
    }

    /// How long the agent may take to let go of keys. The guest runs meanwhile, and a key that is still down is let go of on the other host.
    private static let shortPatience = Duration.milliseconds(200)

    /// Has the agent let go of what viewers of the guest's screen hold down: QEMU takes no key of a guest that is paused, and what runs the guest
    /// afterwards does not know what was down before.
    func releaseInput() async {
        guard (try? record?.commandLine.display()) != nil else { return }
        let path = "\(plan.stateDirectory)/control.sock"
        guard let agent = try? await QMPClient.connect(to: path, on: context.loop, timeout: Self.shortPatience) else {
            return
        }
        defer { agent.close() }
        _ = try? await agent.execute("release-input", ["guest": .string(plan.guest)], timeout: Self.shortPatience)
    }
}
