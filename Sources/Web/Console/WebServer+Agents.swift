internal import Emulator
internal import IO
public import Migration
public import TLS

/// What other hosts' agents have of consoles here. From any thread.
extension WebServer {
    /// Finds the console that another host's agent wants, which has shown that it may.
    ///
    /// - Parameters:
    ///   - opening: what it wants.
    ///   - identity: who it is.
    ///   - mayWrite: whether it may write.
    ///   - mayStay: whether it still may have it; asked now and then.
    /// - Returns: what serves the connection to its end; nil when there is no such console.
    public func console(
        for opening: ConsoleOpening,
        identity: String,
        mayWrite: Bool,
        mayStay: @escaping @Sendable () -> Bool
    ) async -> (@Sendable (TLSChannel) async -> Void)? {
        switch opening.kind {
        case .serial:
            let console = try? await loop.run { () -> GuestConsole? in
                guard self.consoles.count < WebLimits.consoleReaders else { return nil }
                return await self.consoles.console(for: opening)
            }
            guard let console = console ?? nil else { return nil }
            return { channel in
                try? await self.carry(channel) { channel in
                    let reader = ConsoleReader(
                        AgentLine(channel: channel),
                        console,
                        name: identity.shown(most: 200),
                        visitor: "agent \(identity)",
                        mayWrite: mayWrite,
                        agent: identity,
                        path: opening.path,
                        hops: opening.hops,
                        start: (opening.from, opening.ring),
                        mayStay: mayStay
                    )
                    await self.consoles.serve(reader)
                }
            }
        case .vnc:
            let display = try? await loop.run { () -> (any Channel)? in await self.display(for: opening) }
            guard let display = display ?? nil else { return nil }
            return { channel in
                do {
                    try await self.carry(channel) {
                        await self.displays.pass(opening.guest, display, to: $0, mayStay: mayStay)
                    }
                } catch { display.close() }
            }
        }
    }

    /// Why a console cannot be had now that another host's agent has a right to, half a sentence; nil when there is none such. From any thread.
    public func absence(of opening: ConsoleOpening) async -> String? {
        // The serial console of a guest that does not run is had, and says so itself.
        guard opening.kind == .vnc else { return nil }
        let absence = try? await loop.run { await self.displays.local(opening.guest).absence() }
        switch absence ?? nil {
        case .waiting(let reason): return reason
        case .moved(let host): return "the guest has moved on to \(host), which does not give it"
        case .withheld, .never, nil: return nil
        }
    }

    /// The VNC display that another host's agent wants: of a guest that is here, or of one that has gone on from here. Called on the loop.
    private func display(for opening: ConsoleOpening) async -> (any Channel)? {
        if let route = try? await displays.local(opening.guest).open(on: loop) { return route.channel }
        return (try? await remoteDisplay(opening))??.channel
    }

    /// The VNC display of a guest that has gone from here, as the agent of its host passes it on. Called on the loop.
    ///
    /// - Parameters:
    ///   - guest: the guest.
    ///   - view: whether nothing will be written.
    /// - Returns: its bytes, and the host; nil when nothing is known that leads to it.
    /// - Throws: `MigrationError` when that host is away, or does not give it.
    func remoteDisplay(of guest: String, view: Bool) async throws -> (channel: any Channel, host: String)? {
        try await remoteDisplay(ConsoleOpening(guest: guest, kind: .vnc, view: view, hops: 0))
    }

    /// Lets the viewers of guests that have gone follow them. Called on the loop.
    func openPassage() {
        displays.passage = .init(
            open: { [weak self] guest, _ in try await self?.remoteDisplay(of: guest, view: false) },
            isKnown: { [weak self] guest in
                guard let self, configuration.host.openConsole != nil else { return false }
                return await consoles.passage(of: ConsoleOpening(guest: guest, kind: .vnc, hops: 0)) != nil
            }
        )
    }

    private func remoteDisplay(_ opening: ConsoleOpening) async throws -> (channel: any Channel, host: String)? {
        guard let dial = configuration.host.openConsole, let passage = await consoles.passage(of: opening) else {
            return nil
        }
        return (try await dial(passage.departure, passage.opening, loop), passage.departure.host)
    }

    /// Moves a connection to the loop of the consoles, and closes it when what it carries has ended.
    private func carry(
        _ channel: TLSChannel,
        _ body: @escaping @Sendable (any Channel) async -> Void
    ) async throws {
        let moved = try await channel.moved(to: loop)
        try await loop.run {
            defer { moved.close() }
            await body(moved)
        }
    }

    /// Begins to hold the console of a guest that is about to come here.
    public func expectConsole(of guest: String) async { try? await loop.run { await self.consoles.expect(guest) } }

    /// Looks at once where guests are: one has gone.
    public func lookForConsoles() async { try? await loop.run { await self.consoles.look() } }

    /// Keeps what is typed from a guest that is about to be paused to leave, or lets it have that again.
    public func keepConsoleStill(_ still: Bool, of guest: String) async {
        try? await loop.run { self.consoles.beStill(still, guest) }
    }
}
