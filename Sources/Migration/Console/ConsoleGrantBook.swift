internal import IO
internal import TLS

/// Who may have the consoles of guests of this host because it has shown a grant when the guest came: by guest and identity, for a time that begins
/// anew whenever the grant is used. A value: the time is told to it, in seconds since 1970.
public struct ConsoleGrantBook: Sendable, Hashable, Codable {
    /// How long a grant lasts without being used, in seconds.
    public static let longestLife = 24 * 3600
    /// The grants of a guest: as many former hosts of it can look on. The one that ends first gives way.
    public static let mostOfGuest = 8
    /// The grants of all guests; likewise.
    public static let most = 4096

    /// A grant, as far as it is kept.
    private struct Entry: Sendable, Hashable, Codable {
        var guest: String
        /// Who gave it, and who alone may show it.
        var identity: String
        /// The SHA-256 of it, in hexadecimal.
        var digest: String
        var write: Bool
        /// How long it lasts without being used.
        var life: Int
        /// When it ends.
        var expires: Int
    }

    /// What a grant gives to who has shown it.
    public struct Right: Sendable, Hashable {
        /// The guest.
        public let guest: String
        /// Who has shown it.
        public let identity: String
        /// Whether that one may write.
        public let mayWrite: Bool
        fileprivate let digest: String
    }

    private var entries: [Entry] = []

    /// Makes an empty book.
    public init() {}

    /// How many grants there are, those that have ended among them.
    public var count: Int { entries.count }

    /// Notes a grant, in the place of an earlier one of this identity for this guest.
    ///
    /// - Parameters:
    ///   - granting: what was said.
    ///   - guest: the guest.
    ///   - identity: who has proved to be the former host.
    ///   - now: the time.
    public mutating func add(_ granting: ConsoleGranting, guest: String, identity: String, now: Int) {
        entries.removeAll { $0.expires <= now || $0.guest == guest && $0.identity == identity }
        let life = min(max(granting.seconds, 0), Self.longestLife)
        if life == 0 { return }
        let ofGuest = entries.indices.filter { entries[$0].guest == guest }
        if ofGuest.count >= Self.mostOfGuest { dropFirst(of: ofGuest) }
        if entries.count >= Self.most { dropFirst(of: Array(entries.indices)) }
        entries.append(
            Entry(
                guest: guest,
                identity: identity,
                digest: granting.grant.digest.hex,
                write: granting.write,
                life: life,
                expires: now + life
            )
        )
    }

    private mutating func dropFirst(of indices: [Int]) {
        guard let index = indices.min(by: { entries[$0].expires < entries[$1].expires }) else { return }
        entries.remove(at: index)
    }

    /// What an identity may that shows a grant; nil when that is not its own for this guest, or is over. Its time begins anew.
    public mutating func admit(_ grant: ConsoleGrant, guest: String, identity: String, now: Int) -> Right? {
        let digest = grant.digest
        var found: Int?
        // All are looked at: the time says nothing.
        for index in entries.indices {
            let isSame = Digest(bytes: [UInt8](hex: entries[index].digest) ?? []).matches(digest)
            if isSame, entries[index].guest == guest, entries[index].identity == identity { found = index }
        }
        guard let found, entries[found].expires > now else { return nil }
        entries[found].expires = max(entries[found].expires, now + entries[found].life)
        let entry = entries[found]
        return Right(guest: guest, identity: identity, mayWrite: entry.write, digest: entry.digest)
    }

    /// Whether a right still holds that is being used. Its time begins anew.
    public mutating func renew(_ right: Right, now: Int) -> Bool {
        let found = entries.firstIndex {
            $0.guest == right.guest && $0.identity == right.identity && $0.digest == right.digest
        }
        guard let found, entries[found].expires > now else { return false }
        entries[found].expires = max(entries[found].expires, now + entries[found].life)
        return true
    }

    /// The guest has gone to the host of this identity, which needs no grant for it.
    public mutating func remove(guest: String, identity: String) {
        entries.removeAll { $0.guest == guest && $0.identity == identity }
    }
}
