internal import IO
internal import Migration

/// What each identity holds of an agent, and the queues for what it may have only so much of at once.
final class PeerAccounts: @unchecked Sendable {
    // Unchecked: confined to the agent's control loop.

    private struct Account {
        var connections = 0
        var guests = 0
        var bytes = 0
        var hosts = 0
        var recalls = 0
        var consoles = 0

        var isEmpty: Bool {
            connections == 0 && guests == 0 && bytes == 0 && hosts == 0 && recalls == 0 && consoles == 0
        }
    }
    private var accounts: [String: Account] = [:]
    /// When each member was issued its last certificates.
    private var renewals: [String: [ContinuousClock.Instant]] = [:]
    /// The reading of long messages.
    let longMessages = KeyedSemaphore(limit: PeerLimits.longMessages)
    /// The starting and standing of blank copies.
    let blankCopies = KeyedSemaphore(limit: PeerLimits.blankCopies)
    /// The reckoning of digests of files that offers name.
    let digests = KeyedSemaphore(limit: PeerLimits.digests)
    /// The reading of the host's figures.
    let figures = KeyedSemaphore(limit: PeerLimits.figures)

    private func change(_ identity: String, _ body: (inout Account) throws -> Void) rethrows {
        var account = accounts[identity] ?? Account()
        try body(&account)
        accounts[identity] = account.isEmpty ? nil : account
    }

    /// Counts a connection of a kind.
    private func begin(
        _ kind: WritableKeyPath<Account, Int>,
        _ identity: String,
        most: Int,
        _ words: String
    ) throws {
        try change(identity) { account in
            guard account[keyPath: kind] < most else {
                throw ChannelError(.protocolViolation, "The limit of \(most) \(words) is reached")
            }
            account[keyPath: kind] += 1
        }
    }

    /// How many identities hold anything.
    var count: Int { accounts.count }

    /// Counts a connection to the control port.
    ///
    /// - Throws: `ChannelError` that names the limit.
    func connect(_ identity: String) throws {
        try begin(
            \.connections,
            identity,
            most: PeerLimits.connections,
            "connections to the control port for one source"
        )
    }

    /// A connection has ended.
    func disconnect(_ identity: String) { change(identity) { $0.connections -= 1 } }

    /// Counts a connection with the role `host`.
    ///
    /// - Throws: `ChannelError` that names the limit.
    func beginHost(_ identity: String) throws {
        try begin(\.hosts, identity, most: PeerLimits.hostConnections, "connections for evacuations of one source")
    }

    /// Such a connection has ended.
    func endHost(_ identity: String) { change(identity) { $0.hosts -= 1 } }

    /// Counts a connection with the role `console`.
    ///
    /// - Throws: `ChannelError` that names the limit.
    func beginConsole(_ identity: String) throws {
        try begin(\.consoles, identity, most: PeerLimits.consoles, "connections for consoles of one host")
    }

    /// Such a connection has ended.
    func endConsole(_ identity: String) { change(identity) { $0.consoles -= 1 } }

    /// Counts a certificate that a member is issued.
    ///
    /// - Throws: `MigrationError` that names the limit.
    func renew(_ identity: String) throws {
        let (now, span) = (ContinuousClock.now, PeerLimits.renewalSpan)
        renewals = renewals.compactMapValues { times in
            let late = times.filter { now - $0 < span }
            return late.isEmpty ? nil : late
        }
        guard renewals[identity, default: []].count < PeerLimits.renewals else {
            throw MigrationError(
                .refused,
                "The limit of \(PeerLimits.renewals) certificates in \(span) for one host is reached; ask again later"
            )
        }
        renewals[identity, default: []].append(now)
    }

    /// Counts a guest that goes back to its home.
    ///
    /// - Throws: `MigrationError` that names the limit.
    func beginRecall(_ identity: String) throws {
        try change(identity) { account in
            guard account.recalls < PeerLimits.recalls else {
                throw MigrationError(
                    .refused,
                    "The limit of \(PeerLimits.recalls) guests that go back to one host at once is reached; ask again when one has arrived"
                )
            }
            account.recalls += 1
        }
    }

    /// It has arrived, or stays.
    func endRecall(_ identity: String) { change(identity) { $0.recalls -= 1 } }

    /// Counts a guest that is offered.
    ///
    /// - Throws: `MigrationError` that names the limit.
    func beginGuest(_ identity: String) throws {
        try change(identity) { account in
            guard account.guests < PeerLimits.guests else {
                throw MigrationError(
                    .refused,
                    "The limit of \(PeerLimits.guests) guests that are on their way from one source is reached; try again when "
                        + "one of them has arrived"
                )
            }
            account.guests += 1
        }
    }

    /// A guest has arrived or was given up.
    func endGuest(_ identity: String) { change(identity) { $0.guests -= 1 } }

    /// Counts bytes of messages.
    ///
    /// - Throws: `ChannelError` that names the limit.
    func hold(_ bytes: Int, for identity: String) throws {
        try change(identity) { account in
            guard bytes <= PeerLimits.messageBytes - account.bytes else {
                throw ChannelError(
                    .protocolViolation,
                    "The limit of \(PeerLimits.messageBytes >> 20) MiB of messages for one source is reached"
                )
            }
            account.bytes += bytes
        }
    }

    /// Bytes of messages are not kept any more.
    func release(_ bytes: Int, for identity: String) { change(identity) { $0.bytes -= bytes } }
}
