internal import FoundationEssentials
internal import Glibc
public import IO
internal import TLS

/// What `crossdock pair --token` was asked to do.
public struct JoinOrder: Sendable {
    /// The name of the host that may join.
    public var host: String
    /// Its addresses for migrations.
    public var addresses: [String]
    /// This host's name in the fleet; nil for its own.
    public var ownName: String?
    /// This host's addresses, at which the other one reaches it.
    public var ownAddresses: [String]
    /// The port that is open as long as the token is good; 0 to let the system choose.
    public var port: UInt16
    /// How long the token is good.
    public var time: Duration
    /// Whether only this host sends.
    public var isOneWay = false

    /// The usual port.
    public static let port: UInt16 = 10812

    /// Describes a token.
    public init(
        host: String,
        addresses: [String],
        ownName: String? = nil,
        ownAddresses: [String],
        port: UInt16 = JoinOrder.port,
        time: Duration = .seconds(600)
    ) {
        self.host = host
        self.addresses = addresses
        self.ownName = ownName
        self.ownAddresses = ownAddresses
        self.port = port
        self.time = time
    }
}

/// Waits for one host to join, as long as a token is good. Nothing listens before or after.
public final class JoinWaiting: @unchecked Sendable {
    // Unchecked: confined to the loop once it is made.
    private let conductor: PairingConductor
    private let order: JoinOrder
    private let loop: EventLoop
    private var limiter = TryLimiter()
    /// Those that have not shown that they have the secret; the network that has the most of them gives way.
    private var unproven = UnprovenConnections(limit: JoinWaiting.mostUnproven)
    /// Who has been told of to have tried in vain.
    private var told: Set<String> = []
    private var isBusy = false
    private var hasJoined = false
    private var listener: NetworkListener?
    private var credentials: PSKCredentials?

    /// The most connections that have not shown the secret.
    private static let mostUnproven = 16
    /// Of how many addresses the operator is told that they have tried in vain.
    private static let mostTold = 8

    /// Prepares.
    public init(_ conductor: PairingConductor, _ order: JoinOrder, on loop: EventLoop) {
        self.conductor = conductor
        self.order = order
        self.loop = loop
    }

    /// Makes the token, and waits until a host has joined, or the time is over.
    ///
    /// - Parameter show: gets the token, once it can be used.
    /// - Throws: `PairingFailure`.
    public func run(show: @escaping @Sendable (String) -> Void) async throws {
        let (conductor, order) = (conductor, order)
        let made: PairingConductor.Foundation
        do { made = try await BlockingPool.shared.run { try conductor.layFoundation(order) } } catch {
            throw PairingFailure(reason: "\(error)", outcome: .unchanged)
        }
        do {
            try await loop.run { try await self.wait(made, show) }
        } catch {
            await loopless { conductor.removeFoundation(made) }
            throw error as? PairingFailure ?? PairingFailure(reason: "\(error)", outcome: .unchanged)
        }
        guard hasJoined else {
            await loopless { conductor.removeFoundation(made) }
            throw PairingFailure(
                reason: "\(order.host) has not joined in time, and the token is good no more",
                outcome: .unchanged
            )
        }
    }

    private func loopless(_ body: @escaping @Sendable () -> Void) async {
        try? await BlockingPool.shared.run { body() }
    }

    private func wait(_ made: PairingConductor.Foundation, _ show: @Sendable (String) -> Void) async throws {
        let listener = try await NetworkListener.listen(on: [.inet(host: "", port: order.port)], loop: loop)
        self.listener = listener
        guard case .inet(_, let port)? = listener.addresses.first else { throw FleetError("No port could be opened") }
        let token = JoinToken(
            authority: made.authority,
            ends: Int64(Date.now.timeIntervalSince1970) + order.time.components.seconds,
            port: port,
            waiter: made.own.name,
            waiterAddresses: made.own.addresses,
            host: order.host,
            addresses: order.addresses
        )
        var secret = token.secret
        credentials = try PSKCredentials(
            id: "token",
            key: SecretBytes(wiping: &secret),
            user: JoinLink.user,
            endpoint: .server
        )
        let timer = loop.schedule(after: order.time) { [weak self] in
            // A host that is joining already may finish.
            guard let self, !self.isBusy else { return }
            self.listener?.abort()
        }
        defer {
            timer.cancel()
            listener.close()
        }
        show(try token.text)
        let end = ContinuousClock.now + order.time
        await listener.serve { [self] channel in await take(channel, token, until: end) }
    }

    private func take(_ channel: SocketChannel, _ token: JoinToken, until end: ContinuousClock.Instant) async {
        let address = channel.peerAddress?.host ?? ""
        guard let credentials, limiter.admits(address, at: .now) else { return channel.close() }
        if let victim = unproven.add(channel) {
            victim.abort(ChannelError(.closed, "Too many connections have not shown the token's secret"))
        }
        let secured = try? await TLSChannel.handshake(over: channel, credentials: credentials)
        unproven.remove(channel)
        guard let secured else {
            if told.count < Self.mostTold, told.insert(address).inserted {
                conductor.say(.note("\(address.shown(most: 100)) has tried without the token's secret"))
            }
            return
        }
        let link = JoinLink(secured)
        defer { link.close() }
        if let reason = obstacle(link, token) {
            conductor.say(.note("\(address.shown(most: 100)) was refused: \(reason)"))
            try? await link.send(.refused(reason))
            return
        }
        isBusy = true
        let (conductor, order) = (conductor, order)
        do {
            try await BlockingPool.shared.run { try conductor.join(order, over: link) }
            hasJoined = true
        } catch { conductor.say(.note("\(error)")) }
        isBusy = false
        // A failure does not use the token up; its time does.
        if hasJoined || ContinuousClock.now >= end { listener?.abort() }
    }

    private func obstacle(_ link: JoinLink, _ token: JoinToken) -> String? {
        if isBusy || hasJoined { return "the token is being used already" }
        guard let address = link.peerAddress, !token.addresses.contains(address) else {
            return nil
        }
        return
            "the token is good for \(token.host) at \(token.addresses.joined(separator: ", ")), and this connection comes from "
            + "\(address); make one with --address \(address) if that is right"
    }
}
