internal import TLS

/// The sessions of browsers, each behind a cookie.
struct Sessions: Sendable {
    /// A session.
    struct Session: Sendable {
        /// Tells it from others; it is no secret.
        let number: UInt64
        /// What it gives.
        let grant: WebGrant
        /// When it ends.
        let expires: ContinuousClock.Instant
        fileprivate let digest: Digest
        fileprivate var used: ContinuousClock.Instant
    }

    private var sessions: [Session] = []
    private var last: UInt64 = 0

    /// Begins a session; when there are too many, the one that was not used for the longest time ends.
    ///
    /// - Returns: its secret, which is not kept.
    mutating func open(_ grant: WebGrant, now: ContinuousClock.Instant = .now) -> String? {
        sessions.removeAll { $0.expires <= now }
        if sessions.count >= WebLimits.sessions,
            let idle = sessions.indices.min(by: { sessions[$0].used < sessions[$1].used })
        {
            sessions.remove(at: idle)
        }
        let secret = WebSecret.make()
        guard let digest = WebSecret.digest(of: secret) else { return nil }
        last += 1
        sessions.append(
            Session(number: last, grant: grant, expires: now + WebLimits.sessionLife, digest: digest, used: now)
        )
        return secret
    }

    /// The session of a secret; nil when there is none, or its time is over.
    mutating func find(_ secret: String, now: ContinuousClock.Instant = .now) -> Session? {
        guard let digest = WebSecret.digest(of: secret) else { return nil }
        var found: Int?
        for index in sessions.indices where sessions[index].digest.matches(digest) { found = index }
        guard let found, sessions[found].expires > now else { return nil }
        sessions[found].used = now
        return sessions[found]
    }

    /// Whether a session goes on; whoever asks uses it.
    mutating func isOpen(_ number: UInt64, now: ContinuousClock.Instant = .now) -> Bool {
        guard let found = sessions.firstIndex(where: { $0.number == number && $0.expires > now }) else { return false }
        sessions[found].used = now
        return true
    }

    /// Ends a session.
    mutating func close(_ number: UInt64) { sessions.removeAll { $0.number == number } }

    /// How many there are.
    var count: Int { sessions.count }
}
