public import IO
public import Migration
public import TLS

/// A host that may take the guests of another one, as its destination agent answers for it.
///
/// It is asked for one evacuation, under whose id the agent keeps what it grants. A connection that is lost is made anew by the next
/// question; turns end with their connection, reservations with their time. An agent of a release before this one knows none of the
/// questions: the answers are nil then. From any task.
public final class TargetHost: @unchecked Sendable {
    // Unchecked: confined to the loop.

    /// What became of a question for room.
    public enum Admission: Sendable, Hashable {
        /// The room is kept: `MigrationPlan.reservation` names it.
        case granted(HostMessage.Reserved)
        /// It is not, a sentence with the figures.
        case denied(String)
    }

    /// The host, as it was named; its certificate must be for it.
    public let host: String
    /// The port of its agent.
    public let port: UInt16
    /// The evacuation.
    public let evacuation: String
    private let credentials: any TLSCredentials
    private let loop: EventLoop
    private let opening = AsyncLock()
    private var connection: TargetConnection?
    /// What the agent can do, once it was connected to.
    private var features: Set<Feature>?

    /// How long an answer may take, but for that to `turn`.
    private static let patience = Duration.seconds(30)

    /// Names a host; nothing is connected yet.
    ///
    /// - Parameters:
    ///   - host: its name or address.
    ///   - port: the control port of its agent.
    ///   - evacuation: the evacuation's id, as `MigrationStore.isID` takes one.
    ///   - credentials: a client's.
    ///   - loop: where the connection lives.
    public init(
        host: String,
        port: UInt16 = MessageConnection.port,
        evacuation: String,
        credentials: any TLSCredentials,
        on loop: EventLoop
    ) {
        self.host = host
        self.port = port
        self.evacuation = evacuation
        self.credentials = credentials
        self.loop = loop
    }

    /// Names a target of an evacuation; nothing is connected yet.
    convenience init(
        _ target: EvacuationOrder.Target,
        evacuation: String,
        credentials: any TLSCredentials,
        on loop: EventLoop
    ) {
        self.init(host: target.host, port: target.port, evacuation: evacuation, credentials: credentials, on: loop)
    }

    deinit {
        guard let connection else { return }
        loop.execute { connection.close() }
    }

    // MARK: connections

    /// Connects, if there is no connection, and says what the agent can do: without `Feature.evacuation` the questions are answered
    /// with nil.
    ///
    /// - Throws: `MigrationError` with `unreachable`, `security` or `refused`.
    @discardableResult
    public func connect() async throws -> Set<Feature> {
        try await loop.run {
            _ = try await self.open()
            return self.features ?? []
        }
    }

    /// Who the agent proved to be, as authorisation would know it; nil when it is not connected, or knows no such connections.
    public func identity() async throws -> String? {
        try await loop.run { try await self.open()?.session.peer.name }
    }

    /// Says good-bye, and ends the connection, and with it the turns: for who has asked, and has nothing under way.
    public func leave() async {
        try? await loop.run {
            let connection = self.connection
            self.connection = nil
            await connection?.end()
        }
    }

    /// Ends the connection, and with it the turns. What is reserved stays reserved for its time.
    public func close() {
        loop.execute {
            self.connection?.close()
            self.connection = nil
        }
    }

    /// The connection; nil with an agent that knows none of this.
    private func open() async throws -> TargetConnection? {
        await opening.acquire()
        defer { opening.release() }
        if let connection, connection.failure == nil { return connection }
        connection = nil
        let peer = ControlConnection.Peer(host: host, port: port)
        do {
            let next = try await TargetConnection.open(peer, evacuation: evacuation, credentials: credentials, on: loop)
            connection = next
            features = next.features
            return next
        } catch let error as MigrationError where error.code == .refused || error.code == .unreachable {
            // An agent that does not know the role of the connection closes it; what it can do it says in any other greeting.
            let known = try? await TargetConnection.features(of: peer, credentials: credentials, on: loop)
            guard let known, !known.contains(.evacuation) else { throw error }
            features = known
            return nil
        }
    }

    private func ask(
        _ content: HostMessage.Content,
        patience: Duration = TargetHost.patience
    ) async throws -> HostMessage.Content? {
        guard let connection = try await open() else { return nil }
        return try await connection.ask(content, patience: patience)
    }

    private func unexpected(_ answer: HostMessage.Content, to question: String) -> MigrationError {
        if case .denied(let reason) = answer {
            return MigrationError(.refused, "\(host) refused \(question): \(MigrationContext.said(reason))")
        }
        return MigrationError(.failed, "\(host) answered \(question) with \(HostMessage(0, answer).name)")
    }

    // MARK: questions

    /// What the host has to give, for a table; nil from an agent that does not know.
    ///
    /// - Throws: `MigrationError`.
    public func state() async throws -> HostState? {
        try await loop.run {
            guard let answer = try await self.ask(.host(nil)) else { return nil }
            guard case .host(let state?) = answer else { throw self.unexpected(answer, to: "HOST") }
            return state
        }
    }

    /// Has the host look at itself, and at the way back.
    ///
    /// - Parameter examine: what is looked at.
    /// - Returns: what it found; nil from an agent that does not know the question.
    /// - Throws: `MigrationError`.
    public func examine(_ examine: HostMessage.Examine) async throws -> HostMessage.Examined? {
        try await loop.run {
            guard try await self.open() != nil, self.features?.contains(.examination) == true else { return nil }
            let answer = try await self.ask(.examine(examine), patience: .seconds(60))
            guard case .examined(let examined)? = answer else {
                throw self.unexpected(answer ?? .denied("nothing"), to: "EXAMINE")
            }
            return examined
        }
    }

    /// Brings the host the list of its fleet.
    ///
    /// - Returns: whether it has taken it; false from an agent that does not know the message.
    /// - Throws: `MigrationError`.
    public func bring(_ members: HostMessage.Members) async throws -> Bool {
        try await loop.run {
            guard try await self.open() != nil, self.features?.contains(.members) == true else { return false }
            let answer = try await self.ask(.members(members))
            guard case .members? = answer else { throw self.unexpected(answer ?? .denied("nothing"), to: "MEMBERS") }
            return true
        }
    }

    /// Asks the host of the fleet's authority for the next certificate of this host.
    ///
    /// - Parameter request: the request, PEM.
    /// - Returns: the certificate; nil from an agent that does not know the message.
    /// - Throws: `MigrationError`.
    public func renew(_ request: String) async throws -> HostMessage.Renewed? {
        try await loop.run {
            guard try await self.open() != nil, self.features?.contains(.renewal) == true else { return nil }
            let answer = try await self.ask(.renew(request))
            guard case .renewed(let renewed)? = answer else {
                throw self.unexpected(answer ?? .denied("nothing"), to: "RENEW")
            }
            return renewed
        }
    }

    /// Asks for room for a guest, or renews what was granted: one reservation for each guest of the evacuation.
    ///
    /// - Returns: the agent's decision; nil from an agent that decides only when the guest is offered.
    /// - Throws: `MigrationError`; whether there is room is not known then.
    public func reserve(_ room: HostMessage.Reserve) async throws -> Admission? {
        try await loop.run {
            guard let answer = try await self.ask(.reserve(room)) else { return nil }
            switch answer {
            case .reserved(let reserved): return .granted(reserved)
            case .denied(let reason): return .denied(MigrationContext.said(reason))
            default: throw self.unexpected(answer, to: "RESERVE")
            }
        }
    }

    /// Gives room back. One that is not there any more is no error.
    ///
    /// - Throws: `MigrationError`; the room is kept for the rest of its time then.
    public func release(_ reservation: String) async throws {
        try await loop.run {
            guard let answer = try await self.ask(.unreserve(reservation)) else { return }
            guard case .unreserve = answer else { throw self.unexpected(answer, to: "UNRESERVE") }
        }
    }

    /// Waits until no other guest that was asked for has its switchover on the host. Asked in the order of arrival.
    ///
    /// - Parameters:
    ///   - guest: whose switchover it is.
    ///   - patience: how long to wait.
    /// - Returns: the turn, which is held until it is ended; nil from an agent that knows no turns, where nothing is waited for.
    /// - Throws: `MigrationError` with `busy` when it did not come in time, with `refused` when too many wait already, or with
    ///   `cancelled` when the task was cancelled; the place in the queue is given up then.
    public func turn(for guest: String, patience: Duration) async throws -> SwitchoverTurn? {
        try await loop.run {
            do {
                guard let connection = try await self.open() else { return nil }
                return try await connection.turn(guest, patience: patience)
            } catch  where Task.isCancelled { throw MigrationError(.cancelled, "Nobody waits for this turn any more") }
        }
    }

    /// Asks the host to send back guests that came from here: its own source agent moves them.
    ///
    /// - Returns: what is done about each; nil from an agent that does not know how.
    /// - Throws: `MigrationError` with `refused` when its policy does not let this host recall.
    public func recall(_ recall: HostMessage.Recall) async throws -> [HostMessage.Recalled]? {
        try await loop.run {
            if recall.networks != nil, try await self.open() != nil, self.features?.contains(.networks) != true {
                throw MigrationError(
                    .refused,
                    "The agent on \(self.host) is too old for --network; leave it out, or update it"
                )
            }
            guard let answer = try await self.ask(.recall(recall)) else { return nil }
            guard case .recalled(let guests) = answer else { throw self.unexpected(answer, to: "RECALL") }
            return guests.map { guest in
                var guest = guest
                guest.guest = guest.guest.shown(most: 48)
                guest.reason = guest.reason.map(MigrationContext.said)
                guest.lastFailure = guest.lastFailure.map(MigrationContext.said)
                return guest
            }
        }
    }
}
