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
        predecessor: Export? = nil,
        authorize: @escaping @Sendable (TLSPeer?) -> ExportAccess = { _ in .readWrite }
    ) {
        self.name = name
        self.summary = summary
        self.backEnd = backEnd
        self.requiresTLS = requiresTLS
        self.isHidden = isHidden
        self.isExclusive = isExclusive
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

    /// Counts a connection; false when none is admitted.
    func enter(_ channel: any Channel) -> Bool {
        users.withLock { users in
            if users.closed || isExclusive && !users.channels.isEmpty { return false }
            users.channels[ObjectIdentifier(channel)] = channel
            return true
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

/// The exports of a server by name.
public final class ExportTable: Sendable {
    private let exports = Guarded<[String: Export]>([:])
    /// The lives of exports whose clients fence themselves, by name: how many there were, and each of them.
    private let lives = Guarded<[String: (epoch: UInt64, exports: [Export])]>([:])

    /// Makes an empty table.
    public init() {}

    /// Adds an export; one of the same name is replaced for new connections.
    public func add(_ export: Export) { exports.withLock { $0[export.name] = export } }

    /// Adds an export that has a new life under each `NAME#NUMBER` with a higher number than before.
    ///
    /// A client that has lost its connections cannot know what of their requests is still on its way. It connects again
    /// under the next number: before the server carries out anything of the new life, everything of the old one has ended, and
    /// numbers that are not the latest are refused.
    public func addFenced(_ export: Export) {
        lives.withLock { $0[export.name] = (0, [export]) }
        add(export)
    }

    /// Ends all lives of an export: when this returns no request is under way, and none is admitted any more.
    public func closeFenced(_ name: String) async {
        remove(name)
        for export in lives.withLock({ $0.removeValue(forKey: name)?.exports ?? [] }) { await export.close() }
    }

    private func life(_ name: String, for peer: TLSPeer?) -> Export? {
        guard let mark = name.lastIndex(of: "#"), let epoch = UInt64(name[name.index(after: mark)...]) else {
            return nil
        }
        let base = String(name[..<mark])
        return lives.withLock { lives in
            guard let known = lives[base], let current = known.exports.last, epoch >= known.epoch else { return nil }
            if epoch == known.epoch { return current }
            // Whoever may not write has no part in this.
            guard current.access(for: peer) == .readWrite else { return current }
            let next = current.successor(name)
            // What has ended need not be kept; what has not is waited for at the end.
            lives[base] = (epoch, known.exports.filter { $0 === current || $0.connections > 0 } + [next])
            exports.withLock { $0[base] = next }
            return next
        }
    }

    /// Removes an export from the table; `Export.close` ends its use.
    @discardableResult
    public func remove(_ name: String) -> Export? { exports.withLock { $0.removeValue(forKey: name) } }

    /// How many there are.
    public var count: Int { exports.withLock { $0.count } }

    /// All of them, in the order of their names.
    public var all: [Export] { exports.withLock { $0.values.sorted { $0.name < $1.name } } }

    /// What a peer finds under a name.
    enum Finding {
        case found(Export, ExportAccess)
        case denied(String)
        case needsTLS
        case nothing
    }

    /// Looks a name up for a peer. The empty name means the only export there is, when none has that name.
    func find(_ name: String, for peer: TLSPeer?, isSecure: Bool) -> Finding {
        let found = exports.withLock { exports in
            exports[name] ?? (name.isEmpty && exports.count == 1 ? exports.first?.value : nil)
        }
        guard let found = found ?? life(name, for: peer) else { return .nothing }
        if found.requiresTLS, !isSecure { return .needsTLS }
        switch found.access(for: peer) {
        case .denied(let reason): return found.isHidden ? .nothing : .denied(reason)
        case let access: return .found(found, access)
        }
    }

    /// What a peer may use, in the order of the names.
    func list(for peer: TLSPeer?, isSecure: Bool) -> [Export] {
        all.filter { export in
            if export.requiresTLS, !isSecure { return false }
            if case .denied = export.access(for: peer) { return false }
            return true
        }
    }
}
