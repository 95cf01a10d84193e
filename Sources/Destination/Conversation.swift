internal import IO
internal import Migration

/// The control connections of one migration: one, and while its loss goes unnoticed another one.
final class Conversation: @unchecked Sendable {
    // Unchecked: confined to the agent's control loop.

    private var connections: [MessageConnection] = []
    private var waiting = 0
    /// Bytes of a PROBE that are still to come.
    private var probe = 0
    /// What the source can do beyond the first version of the protocol.
    private(set) var features: Set<Feature> = []

    /// Whether the source cannot be heard.
    var isEmpty: Bool { connections.isEmpty }

    /// Takes a connection in the place of earlier ones, whose loss was not noticed here.
    func begin(_ connection: MessageConnection, _ features: Set<Feature>) {
        for earlier in connections {
            earlier.channel.abort(ChannelError(.closed, "The source has connected again"))
        }
        connections.append(connection)
        self.features = features
        probe = 0
    }

    /// Forgets a connection.
    func end(_ connection: MessageConnection) { connections.removeAll { $0 === connection } }

    /// Says something that was not asked for, as far as that is possible at once.
    func tell(_ message: Message) async {
        for connection in connections {
            try? await connection.channel.withDeadline(.seconds(1), for: message.name) {
                try await connection.send(message)
            }
        }
    }

    /// Counts a message that has to wait for others.
    func enqueue() throws {
        guard waiting < PeerLimits.waitingMessages else {
            throw ChannelError(
                .protocolViolation,
                "The limit of \(PeerLimits.waitingMessages) messages that wait is reached"
            )
        }
        waiting += 1
    }

    /// Counts a message that was handled.
    func dequeue() { waiting -= 1 }

    private var hasConsole = false

    /// Whether the end of a console may come: it does once.
    func takesConsole() -> Bool {
        defer { hasConsole = true }
        return !hasConsole
    }

    private var grants = 0

    /// Whether a grant may come: it does once for each source agent that ends the migration.
    func takesGrant() -> Bool {
        grants += 1
        return grants <= 8
    }

    // MARK: PROBE

    /// Whether data frames belong to a PROBE.
    var isProbing: Bool { probe > 0 }

    func beginProbe(_ count: Int, _ connection: MessageConnection) async throws {
        guard probe == 0, (0...(64 << 20)).contains(count) else {
            throw ChannelError(.protocolViolation, "PROBE of \(count) bytes is not due")
        }
        if count == 0 { try await connection.send(.probe(0)) } else { probe = count }
    }

    func receiveProbe(_ count: Int, _ connection: MessageConnection) async throws {
        probe -= min(count, probe)
        if probe == 0 { try await connection.send(.probe(0)) }
    }
}
