internal import Glibc
public import IO
internal import Synchronization
public import TLS

/// Serves named exports to any number of connections, spread over a group of loops.
public final class NBDServer: Sendable {
    /// What bounds a server.
    public struct Limits: Sendable {
        /// How many connections may use exports at once; further ones are closed at once, unless there is `patience`.
        public var connections = 1024
        /// How long a connection for which there is no place waits for one before it is told why: within `handshake`. A client that goes is there
        /// still until the server has heard of it.
        public var patience = Duration.zero
        /// How many of them one peer may have, by the name that it proved; nil for as many as there are places.
        public var connectionsForPeer: Int?
        /// How many bytes of payload the requests of one peer may hold, over all its connections; further ones wait for its own. Nil for
        /// what its connections may hold each.
        public var payloadForPeer: Int?
        /// How many may use the same export at once; nil for as many as there are places.
        public var connectionsToExport: Int?
        /// How many more may be in the negotiation, where nobody has proved anything yet. When all places are taken, the oldest
        /// negotiation of the network that has the most gives way; see `UnprovenConnections`.
        public var negotiating = 128
        /// The time from accept to the end of the negotiation; nothing is timed after that.
        public var handshake = Duration.seconds(10)

        /// The defaults.
        public init() {}
    }

    /// What it offers.
    public let exports: ExportTable
    private let credentials: (any TLSCredentials)?
    private let mode: TLSMode
    private let access: AccessControl?
    private let loops: EventLoopGroup
    private let limits: Limits
    private let log: @Sendable (String) -> Void
    private let note: @Sendable (String) -> Void
    private let onDisconnect: @Sendable (Int) -> Void
    private let connections: ConnectionTable
    private let draining = Atomic<Bool>(false)
    private let received = Atomic<UInt64>(0)

    /// Makes a server.
    ///
    /// - Parameters:
    ///   - exports: what it offers; may change while it serves.
    ///   - credentials: with them there is TLS; without them there is none.
    ///   - mode: whether TLS is required when there are credentials; it is, when this is not given.
    ///   - access: whom TLS lets in; everybody whom the credentials trust when it is not given. Who is not let in is told so.
    ///   - loops: where the connections live.
    ///   - limits: the bounds.
    ///   - log: gets a sentence for each connection that failed.
    ///   - note: gets what is of interest only to somebody who looks into a connection: a liberty that a client took, once for
    ///     each connection.
    ///   - onDisconnect: called when a connection that used an export has ended, with the number of those that are left.
    public init(
        exports: ExportTable,
        credentials: (any TLSCredentials)?,
        mode: TLSMode? = nil,
        access: AccessControl? = nil,
        loops: EventLoopGroup,
        limits: Limits = Limits(),
        log: @escaping @Sendable (String) -> Void = { _ in },
        note: @escaping @Sendable (String) -> Void = { _ in },
        onDisconnect: @escaping @Sendable (Int) -> Void = { _ in }
    ) {
        self.exports = exports
        self.credentials = credentials
        self.mode = credentials == nil ? .none : mode ?? .required
        self.access = access
        self.loops = loops
        self.limits = limits
        self.log = log
        self.note = note
        self.onDisconnect = onDisconnect
        connections = ConnectionTable(limits: limits)
    }

    /// How many connections use an export.
    public var exportConnectionCount: Int { connections.settledCount }

    /// How many bytes clients have sent to be written, as they are written: what was compressed on its way counts as what it stands for, and zeroes that
    /// were only named do not count.
    public var receivedBytes: UInt64 { received.load(ordering: .relaxed) }

    /// How many connections there are, those in the negotiation included.
    public var connectionCount: Int { connections.count }

    /// Accepts connections until the listener is closed.
    ///
    /// Called on the listener's loop. Connections outlive the call; `drain` and `Export.close` end them.
    public func serve(_ listener: Listener) async {
        while true {
            guard let accepted = try? await listener.acceptDescriptor() else { return }
            let loop = loops.next()
            Task(executorPreference: loop) {
                do {
                    let channel = try SocketChannel(
                        adopting: accepted.descriptor,
                        on: loop,
                        peerName: accepted.peerName
                    )
                    channel.toleratePauses()
                    try await self.serve(channel)
                } catch let error as ChannelError where error.code == .closed {
                    // Whoever closed the export said so already.
                } catch {
                    self.log("\(error)")
                }
            }
        }
    }

    /// Ends the service in the orderly way: what is under way is finished, everything new is refused with "shutting down", and who
    /// has not gone after `grace` is dropped. Listeners are closed before, by their owner.
    public func drain(grace: Duration = .seconds(2)) async {
        draining.store(true, ordering: .relaxed)
        let loop = loops.next()
        let dropping = Task(executorPreference: loop) {
            await loop.sleep(for: grace)
            if !Task.isCancelled {
                self.connections.abortAll(ChannelError(.closed, "The NBD server is shutting down"))
            }
        }
        await connections.waitUntilEmpty()
        dropping.cancel()
        for export in exports.all { try? await export.backEnd.flush() }
    }

    /// Serves one connection to its end. Called on the channel's loop.
    ///
    /// - Throws: why the connection failed; an orderly end is no failure.
    public func serve(_ base: any Channel) async throws {
        guard connections.add(base) else {
            base.close()
            throw ChannelError(
                .protocolViolation,
                "Refused \(base.peerName): \(limits.connections) connections are open"
            )
        }
        defer { connections.remove(base) }
        var channel = base
        defer { channel.close() }
        let result = try await base.withDeadline(limits.handshake, for: "The NBD negotiation") {
            try await negotiate(base)
        }
        guard let (secured, negotiated) = result else { return }
        channel = secured.features.contains(.buffersWrites) ? secured : BufferedChannel(over: secured)
        defer {
            negotiated.export.leave(base)
            connections.remove(base)
            onDisconnect(connections.settledCount)
        }
        let transmission = Transmission(
            channel: channel,
            negotiated,
            account: connections.account(of: base),
            received: { self.received.wrappingAdd(UInt64($0), ordering: .relaxed) },
            draining: { self.draining.load(ordering: .relaxed) }
        )
        defer {
            if transmission.unflaggedWrites > 0 {
                note(
                    "\(base.peerName) sent \(transmission.unflaggedWrites) writes without NBD_CMD_FLAG_PAYLOAD_LEN, "
                        + "which extended headers require; they were taken"
                )
            }
        }
        try await transmission.run()
    }

    private func dropped(_ channel: any Channel, _ reason: String) -> ChannelError {
        ChannelError(.protocolViolation, "Dropped \(channel.peerName): \(reason)")
    }

    private func negotiate(_ base: any Channel) async throws -> (any Channel, NegotiatedExport)? {
        var channel = base
        // Who is checked by name has to have one.
        let needsName = access?.authorization != nil
        var handshake = ServerHandshake(mode: mode, exports: exports, clearTextMayUse: !needsName)
        try await channel.write(ServerHandshake.greeting)
        var flags: MessageReader
        do {
            flags = MessageReader(try await channel.read(exactly: 4))
        } catch let error as ChannelError where error.code == .closed {
            return nil
        }
        if let reason = handshake.receive(clientFlags: flags.integer() ?? 0) { throw dropped(channel, reason) }
        // The bound keeps a client from staying in the negotiation with cheap options, and leaves room for one that asks
        // about each export.
        for _ in 0..<(1024 + 4 * exports.count) {
            var header: MessageReader
            do {
                header = MessageReader(try await channel.read(exactly: 16))
            } catch let error as ChannelError where error.code == .closed {
                return nil
            }
            guard header.integer(UInt64.self) == NBDWire.optionMagic, let option = header.integer(UInt32.self),
                let length = header.integer(UInt32.self)
            else { throw dropped(channel, "not an NBD option") }
            handshake.isDraining = draining.load(ordering: .relaxed)
            if length > NBDWire.maximumOption {
                guard length <= 65536 else { throw dropped(channel, "an option of \(length) bytes") }
                if option == NBDOption.exportName.rawValue {
                    // This option has no error reply.
                    throw dropped(channel, "a name of \(length) bytes")
                }
                _ = try await channel.read(exactly: Int(length))
                try await channel.write(handshake.tooBig(option: option))
                continue
            }
            let payload = try await channel.read(exactly: Int(length))
            switch handshake.receive(option: option, payload: payload) {
            case .reply(let bytes): try await channel.write(bytes)
            case .disconnect(let bytes, let reason):
                // Who ends the negotiation often does not wait for the answer.
                if reason.isEmpty { try? await channel.write(bytes) } else { try await channel.write(bytes) }
                try? await channel.finishWriting()
                if reason.isEmpty { return nil }
                throw dropped(channel, reason)
            case .startTLS(let bytes):
                guard let credentials else { return nil }
                try await channel.write(bytes)
                let secure = try await TLSChannel.handshake(
                    over: channel,
                    credentials: credentials,
                    timeout: limits.handshake
                )
                channel = secure
                handshake.startedTLS(secure.session.peer, denial: denial(secure.session.peer, channel))
            case .transmit(let bytes, let negotiated):
                let peer = (channel as? TLSChannel)?.session.peer.name
                if let reason = await admitInTime(base, peer, to: negotiated.export) {
                    guard option == NBDOption.go.rawValue else { throw dropped(channel, reason) }
                    try await channel.write(OptionReply.error(option: option, type: NBDOptionReply.policy, reason))
                    continue
                }
                await negotiated.export.displace()
                do {
                    try await channel.write(bytes)
                } catch {
                    negotiated.export.leave(base)
                    throw error
                }
                return (channel, negotiated)
            }
        }
        throw dropped(channel, "too many options")
    }

    /// The same as `admit`, and a connection for which there is no place waits for one.
    private func admitInTime(_ base: any Channel, _ peer: String?, to export: Export) async -> String? {
        let end = ContinuousClock.now + limits.patience
        while true {
            let departures = connections.departures
            guard let reason = admit(base, peer, to: export) else { return nil }
            let left = end - .now
            guard left > .zero, !draining.load(ordering: .relaxed) else { return reason }
            await connections.waitForDeparture(after: departures, within: left, on: base.loop)
        }
    }

    /// Counts a connection among those that use an export; the reason when there is no place for it.
    private func admit(_ base: any Channel, _ peer: String?, to export: Export) -> String? {
        if let reason = export.enter(base, limit: limits.connectionsToExport) { return reason }
        guard let reason = connections.settle(base, for: peer) else { return nil }
        export.leave(base)
        return reason
    }

    /// Why a peer may use nothing here; it is told in these words, and the log has them too.
    private func denial(_ peer: TLSPeer, _ channel: any Channel) -> String? {
        do {
            try access?.check(peer)
            return nil
        } catch {
            log("Refused \(channel.peerName): \(error)")
            return "\(error)"
        }
    }
}
