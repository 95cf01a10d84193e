internal import Glibc
public import IO
internal import Synchronization
public import TLS

/// Serves named exports to any number of connections, spread over a group of loops.
public final class NBDServer: Sendable {
    /// What bounds a server.
    public struct Limits: Sendable {
        /// How many connections at once; further ones are closed at once.
        public var connections = 1024
        /// How many of them may be in the negotiation, where nobody has proved anything yet.
        public var negotiating = 128
        /// The time from accept to the end of the negotiation.
        public var handshake = Duration.seconds(10)

        /// The defaults.
        public init() {}
    }

    /// What it offers.
    public let exports: ExportTable
    private let credentials: (any TLSCredentials)?
    private let access: AccessControl?
    private let loops: EventLoopGroup
    private let limits: Limits
    private let log: @Sendable (String) -> Void
    private let active = Atomic<Int>(0)
    private let negotiating = Atomic<Int>(0)

    /// Makes a server.
    ///
    /// - Parameters:
    ///   - exports: what it offers; may change while it serves.
    ///   - credentials: with them TLS is required of every client; without them there is none.
    ///   - access: whom TLS lets in; everybody whom the credentials trust when it is not given.
    ///   - loops: where the connections live.
    ///   - limits: the bounds.
    ///   - log: gets a sentence for each connection that failed.
    public init(
        exports: ExportTable,
        credentials: (any TLSCredentials)?,
        access: AccessControl? = nil,
        loops: EventLoopGroup,
        limits: Limits = Limits(),
        log: @escaping @Sendable (String) -> Void = { _ in }
    ) {
        self.exports = exports
        self.credentials = credentials
        self.access = access
        self.loops = loops
        self.limits = limits
        self.log = log
    }

    /// Accepts connections until the listener is closed.
    ///
    /// Called on the listener's loop. Connections outlive the call; `Export.close` ends them.
    public func serve(_ listener: Listener) async {
        while true {
            guard let fd = try? await listener.acceptDescriptor() else { return }
            if active.load(ordering: .relaxed) >= limits.connections
                || negotiating.load(ordering: .relaxed) >= limits.negotiating
            {
                close(fd)
                log("Refused an NBD connection: too many are open already")
                continue
            }
            let loop = loops.next()
            active.wrappingAdd(1, ordering: .relaxed)
            Task(executorPreference: loop) {
                defer { self.active.wrappingSubtract(1, ordering: .relaxed) }
                do {
                    try await self.serve(SocketChannel(adopting: fd, on: loop))
                } catch let error as ChannelError where error.code == .closed {
                    // Whoever closed the export said so already.
                } catch {
                    self.log("\(error)")
                }
            }
        }
    }

    /// Serves one connection to its end. Called on the channel's loop.
    ///
    /// - Throws: why the connection failed; an orderly end is no failure.
    public func serve(_ base: any Channel) async throws {
        var channel = base
        defer { channel.close() }
        negotiating.wrappingAdd(1, ordering: .relaxed)
        let result: (any Channel, Export, Bool, Bool)?
        do {
            defer { negotiating.wrappingSubtract(1, ordering: .relaxed) }
            result = try await base.withDeadline(limits.handshake, for: "The NBD negotiation") {
                try await negotiate(base)
            }
        }
        guard let (secured, export, structured, contexts) = result else { return }
        channel = secured
        guard export.enter(channel) else { return }
        defer { export.leave(channel) }
        let transmission = Transmission(
            channel: channel,
            export: export,
            structured: structured,
            hasContexts: contexts
        )
        try await transmission.run()
    }

    private func negotiate(_ base: any Channel) async throws -> (any Channel, Export, Bool, Bool)? {
        var channel = base
        var handshake = ServerHandshake(requiresTLS: credentials != nil, exports: exports)
        try await channel.write(ServerHandshake.greeting)
        var flags = MessageReader(try await channel.read(exactly: 4))
        if let reason = handshake.receive(clientFlags: flags.integer() ?? 0) {
            throw ChannelError(.protocolViolation, "Dropped \(channel.peerName): \(reason)")
        }
        // The bound keeps a client from staying in the negotiation with cheap options.
        for _ in 0..<1024 {
            var header: MessageReader
            do {
                header = MessageReader(try await channel.read(exactly: 16))
            } catch let error as ChannelError where error.code == .closed {
                return nil
            }
            guard header.integer(UInt64.self) == NBDWire.optionMagic, let option = header.integer(UInt32.self),
                let length = header.integer(UInt32.self)
            else { throw ChannelError(.protocolViolation, "Dropped \(channel.peerName): not an NBD option") }
            if length > NBDWire.maximumOption {
                guard length <= 65536 else {
                    throw ChannelError(
                        .protocolViolation,
                        "Dropped \(channel.peerName): an option of \(length) bytes"
                    )
                }
                if option == NBDOption.exportName.rawValue {
                    // This option has no error reply.
                    throw ChannelError(.protocolViolation, "Dropped \(channel.peerName): a name of \(length) bytes")
                }
                _ = try await channel.read(exactly: Int(length))
                try await channel.write(handshake.tooBig(option: option))
                continue
            }
            let payload = try await channel.read(exactly: Int(length))
            switch handshake.receive(option: option, payload: payload) {
            case .reply(let bytes): try await channel.write(bytes)
            case .disconnect(let bytes, let reason):
                try await channel.write(bytes)
                try? await channel.finishWriting()
                if reason.isEmpty { return nil }
                throw ChannelError(.protocolViolation, "Dropped \(channel.peerName): \(reason)")
            case .startTLS(let bytes):
                guard let credentials else { return nil }
                try await channel.write(bytes)
                let secure = try await TLSChannel.handshake(
                    over: channel,
                    credentials: credentials,
                    timeout: limits.handshake
                )
                channel = secure
                do {
                    try access?.check(secure.session.peer)
                } catch {
                    throw ChannelError(.tls, "Dropped \(secure.peerName): \(error)")
                }
                handshake.startedTLS(secure.session.peer)
            case .transmit(let bytes, let export):
                try await channel.write(bytes)
                return (channel, export, handshake.structuredReplies, handshake.hasAllocationContext)
            }
        }
        throw ChannelError(.protocolViolation, "Dropped \(channel.peerName): too many options")
    }
}
