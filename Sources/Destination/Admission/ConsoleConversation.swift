internal import IO
public import Migration
public import TLS

/// What another host's agent wants of a guest's console, once it is clear that it may.
public struct ConsoleRequest: Sendable {
    /// What it wants.
    public let opening: ConsoleOpening
    /// Who it has proved to be.
    public let identity: String
    /// Whether it may write.
    public let mayWrite: Bool
    /// Whether it still may have it; asked now and then, from any thread.
    public let mayStay: @Sendable () -> Bool
}

/// What serves a console that was asked for: gets the connection behind OPENED, and returns when it ends.
public typealias ServeConsole = @Sendable (TLSChannel) async -> Void

/// A connection with the role `console`: OPEN, an answer, and then the console itself.
///
/// Whoever may not is answered with the same words whether there is such a guest or not, and after the same time.
struct ConsoleConversation {
    let agent: DestinationAgent
    let peer: TLSPeer
    let channel: TLSChannel
    let connection: MessageConnection

    /// How long a refusal is held back, so that a connection tries little.
    private static let refusalDelay = Duration.seconds(1)

    static func refusal(of identity: String) -> String {
        "This host opens no such console to '\(identity.shown(most: 500))': it has none, or was given no right for it"
    }

    /// Serves the connection to its end.
    func serve() async throws {
        connection.limit = PeerLimits.openingBytes
        try await connection.send(.welcome(.init(state: .new)))
        let opening = try await channel.withDeadline(PeerLimits.greeting, for: "OPEN") {
            guard case .open(let opening) = try await connection.receiveMessage(), opening.isPlausible else {
                throw ChannelError(.protocolViolation, "\(channel.peerName) did not say which console it wants")
            }
            return opening
        }
        let words = "the \(opening.kind.rawValue) console of guest '\(opening.guest)'"
        let request = await request(opening)
        let serve: ServeConsole? =
            if let request { await agent.configuration.openConsole?(request) ?? nil } else { nil }
        guard let request, let serve else {
            await agent.loop.sleep(for: Self.refusalDelay)
            // Who has the right may know that there is such a guest.
            if request != nil, let absence = await agent.configuration.consoleAbsence?(opening) ?? nil {
                try? await connection.send(
                    .abort("\(words.prefix(1).uppercased() + words.dropFirst()) cannot be had now: \(absence)")
                )
                return
            }
            try? await connection.send(.abort(Self.refusal(of: peer.name)))
            throw ChannelError(
                .protocolViolation,
                "'\(peer.name.shown(most: 500))' was refused \(words); --allow-console would let it have the consoles of this host's guests"
            )
        }
        agent.openings(.info, "'\(peer.name)' opens \(words)\(request.mayWrite ? "" : " to look")")
        try await connection.send(.opened)
        await serve(channel)
    }

    /// What the peer may, by its grant or by the operator's word; nil when that is nothing.
    private func request(_ opening: ConsoleOpening) async -> ConsoleRequest? {
        let (grants, identity, access, peer) = (agent.grants, peer.name, agent.access, peer)
        let isKnown: @Sendable () -> Bool = { (try? access.check(peer)) != nil }
        // A display is passed on as it is, and who has it can write.
        func suits(_ mayWrite: Bool) -> Bool { mayWrite || opening.kind != .vnc }
        // Nobody but who opens it keeps viewers of a display from typing.
        let isOnlyViewed = opening.view && opening.kind != .vnc
        if let grant = opening.grant {
            let right = await BlockingPool.shared.value {
                grants.admit(grant, guest: opening.guest, identity: identity)
            }
            if let right, suits(right.mayWrite) {
                return ConsoleRequest(
                    opening: opening,
                    identity: identity,
                    mayWrite: right.mayWrite && !isOnlyViewed,
                    mayStay: { isKnown() && grants.renew(right) }
                )
            }
        }
        guard let mayWrite = agent.configuration.policy.consoleReaders[identity], suits(mayWrite) else { return nil }
        return ConsoleRequest(
            opening: opening,
            identity: identity,
            mayWrite: mayWrite && !isOnlyViewed,
            mayStay: isKnown
        )
    }
}
