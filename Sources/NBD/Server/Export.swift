internal import IO
public import TLS

/// What a peer may do with an export.
public enum ExportAccess: Sendable, Equatable {
    /// Nothing; the text says why, to peers that proved who they are.
    case denied(String)
    /// Read.
    case readOnly
    /// Read and write, when the back end can.
    case readWrite
}

/// Something that a server offers by name.
public final class Export: Sendable {
    /// The name, at most 4096 bytes.
    public let name: String
    /// What it is, for people.
    public let summary: String
    /// What it serves.
    public let backEnd: any BackEnd
    /// Whether it is only there within TLS, for a server that leaves the choice to the client.
    public let requiresTLS: Bool
    /// Whether a peer that may not use it is told that it does not exist.
    public let isHidden: Bool
    /// Whether only one connection uses it at a time.
    public let isExclusive: Bool
    /// Whether writes may come compressed (`NBDConnection.submitCompressed`).
    public let takesCompressed: Bool
    private let authorize: @Sendable (TLSPeer?) -> ExportAccess
    /// What this one takes the place of: its requests end before any of this one's begins.
    private let predecessor: Guarded<Export?>
    private let users = Guarded(Users())

    private struct Users {
        var channels: [ObjectIdentifier: any Channel] = [:]
        var closed = false
        var waiting: [UnsafeContinuation<Void, Never>] = []
    }

    /// Makes an export.
    ///
    /// - Parameters:
    ///   - name: its name.
    ///   - summary: what it is, for people.
    ///   - backEnd: what it serves.
    ///   - requiresTLS: whether it is only there within TLS; matters for a server whose clients may choose.
    ///   - isHidden: whether a peer that may not use it is told that it does not exist.
    ///   - isExclusive: whether a second connection is refused.
    ///   - takesCompressed: whether writes may come compressed.
    ///   - predecessor: what this one takes the place of.
    ///   - authorize: who may do what; everybody who got through TLS may do all, when it is not given. The peer is nil in
    ///     clear text.
    public init(
        name: String,
        summary: String = "",
        backEnd: any BackEnd,
        requiresTLS: Bool = false,
        isHidden: Bool = true,
        isExclusive: Bool = false,
        takesCompressed: Bool = false,
        predecessor: Export? = nil,
        authorize: @escaping @Sendable (TLSPeer?) -> ExportAccess = { _ in .readWrite }
    ) {
        self.name = name
        self.summary = summary
        self.backEnd = backEnd
        self.requiresTLS = requiresTLS
        self.isHidden = isHidden
        self.isExclusive = isExclusive
        self.takesCompressed = takesCompressed
        self.predecessor = Guarded(predecessor)
        self.authorize = authorize
    }

    func access(for peer: TLSPeer?) -> ExportAccess {
        let access = authorize(peer)
        return access == .readWrite && backEnd.isReadOnly ? .readOnly : access
    }

    /// The transmission flags for a kind of access.
    func flags(_ access: ExportAccess, form: HeaderForm) -> TransmissionFlags {
        let traits = backEnd.traits
        var flags: TransmissionFlags = [.hasFlags, .sendFlush, .sendFUA]
        if form != .simple { flags.insert(.sendDF) }
        if form == .extended, !traits.contexts.isEmpty { flags.insert(.blockStatusPayload) }
        if traits.isConsistent, !isExclusive { flags.insert(.canMultiConn) }
        if traits.isRotational { flags.insert(.rotational) }
        if traits.hasCache { flags.insert(.sendCache) }
        if access == .readWrite {
            flags.insert(.sendWriteZeroes)
            if traits.hasTrim { flags.insert(.sendTrim) }
            if traits.hasFastZero { flags.insert(.sendFastZero) }
        } else {
            flags.insert(.readOnly)
        }
        return flags
    }

    /// How many connections use it now.
    public var connections: Int { users.withLock { $0.channels.count } }

    /// Ends all use: connections are dropped, none is admitted any more, and when this returns no request is under way.
    public func close() async {
        let channels = users.withLock { users in
            users.closed = true
            return Array(users.channels.values)
        }
        for channel in channels { channel.abort(ChannelError(.closed, "The export '\(name)' was closed")) }
        await withUnsafeContinuation { continuation in
            let isFree = users.withLock { users in
                if users.channels.isEmpty { return true }
                users.waiting.append(continuation)
                return false
            }
            if isFree { continuation.resume() }
        }
    }

    /// The same export in its next life, which ends this one's.
    func successor(_ name: String) -> Export {
        Export(
            name: name,
            summary: summary,
            backEnd: backEnd,
            requiresTLS: requiresTLS,
            isHidden: isHidden,
            isExclusive: isExclusive,
            takesCompressed: takesCompressed,
            predecessor: self,
            authorize: authorize
        )
    }

    /// Ends the use of what this one takes the place of; when this returns none of its requests is under way.
    func displace() async {
        guard let earlier = predecessor.withLock({ $0 }) else { return }
        await earlier.displace()
        await earlier.close()
        predecessor.withLock { $0 = nil }
    }

    /// Counts a connection.
    ///
    /// - Parameter limit: how many there may be; nil for any number.
    /// - Returns: why it is not admitted; nil when it is.
    func enter(_ channel: any Channel, limit: Int? = nil) -> String? {
        users.withLock { users in
            if users.closed { return "The export is being closed" }
            if isExclusive, !users.channels.isEmpty {
                return "The export is in use, and only one connection may use it"
            }
            if let limit, users.channels.count >= limit {
                return "The limit of \(limit) connections to one export is reached"
            }
            users.channels[ObjectIdentifier(channel)] = channel
            return nil
        }
    }

    func leave(_ channel: any Channel) {
        let waiting = users.withLock { users in
            users.channels[ObjectIdentifier(channel)] = nil
            guard users.channels.isEmpty else { return [UnsafeContinuation<Void, Never>]() }
            defer { users.waiting = [] }
            return users.waiting
        }
        for continuation in waiting { continuation.resume() }
    }
}
