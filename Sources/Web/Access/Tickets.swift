internal import TLS

/// The tickets that were given out and not used: each opens one session.
struct Tickets: Sendable {
    private struct Ticket: Sendable {
        let digest: Digest
        let grant: WebGrant
        let expires: ContinuousClock.Instant
    }

    /// Why there is no ticket.
    enum Refusal: Error, Sendable, Hashable {
        /// The time to live is none, or too long.
        case life
        /// Too many wait to be used.
        case many
    }

    private var tickets: [Ticket] = []

    /// Makes a ticket.
    ///
    /// - Parameters:
    ///   - grant: what it gives.
    ///   - life: how long it holds; at most `WebLimits.ticketLife`.
    ///   - now: the time.
    /// - Returns: its secret, which is not kept.
    mutating func make(
        _ grant: WebGrant,
        life: Duration,
        now: ContinuousClock.Instant = .now
    ) throws(Refusal) -> String {
        guard life > .zero, life <= WebLimits.ticketLife else { throw .life }
        tickets.removeAll { $0.expires <= now }
        guard tickets.count < WebLimits.tickets else { throw .many }
        let secret = WebSecret.make()
        guard let digest = WebSecret.digest(of: secret) else { throw .many }
        tickets.append(Ticket(digest: digest, grant: grant, expires: now + life))
        return secret
    }

    /// Uses a ticket up.
    ///
    /// - Returns: what it gives; nil for one that is not known, was used or has expired.
    mutating func redeem(_ secret: String, now: ContinuousClock.Instant = .now) -> WebGrant? {
        tickets.removeAll { $0.expires <= now }
        guard let digest = WebSecret.digest(of: secret) else { return nil }
        var found: Int?
        // All are looked at: the time says nothing.
        for index in tickets.indices where tickets[index].digest.matches(digest) { found = index }
        return found.map { tickets.remove(at: $0).grant }
    }
}
