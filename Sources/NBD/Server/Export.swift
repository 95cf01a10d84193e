internal import IO
internal import Synchronization
public import TLS

/// Something that a server offers by name.
public final class Export: Sendable {
    /// The name, at most 4096 bytes.
    public let name: String
    /// What it is, for people.
    public let summary: String
    /// What it serves.
    public let backEnd: any BackEnd
    /// Who may use it; a peer that may not does not learn that it exists.
    public let authorize: @Sendable (TLSPeer?) -> Bool
    private let users = Mutex(Users())

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
    ///   - authorize: who may use it; everybody who got through TLS, when it is not given.
    public init(
        name: String,
        summary: String = "",
        backEnd: any BackEnd,
        authorize: @escaping @Sendable (TLSPeer?) -> Bool = { _ in true }
    ) {
        self.name = name
        self.summary = summary
        self.backEnd = backEnd
        self.authorize = authorize
    }

    /// The transmission flags.
    public var flags: TransmissionFlags {
        var flags: TransmissionFlags = [.hasFlags, .sendFlush, .sendFUA, .sendDF, .canMultiConn]
        if backEnd.isReadOnly {
            flags.insert(.readOnly)
        } else {
            flags.formUnion([.sendTrim, .sendWriteZeroes])
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

    func enter(_ channel: any Channel) -> Bool {
        users.withLock { users in
            if users.closed { return false }
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
    private let exports = Mutex<[String: Export]>([:])

    /// Makes an empty table.
    public init() {}

    /// Adds an export; one of the same name is replaced for new connections.
    public func add(_ export: Export) { exports.withLock { $0[export.name] = export } }

    /// Removes an export from the table; `Export.close` ends its use.
    @discardableResult
    public func remove(_ name: String) -> Export? { exports.withLock { $0.removeValue(forKey: name) } }

    /// The export of a name, if this peer may use it. The empty name means the only export there is.
    public func find(_ name: String, for peer: TLSPeer?) -> Export? {
        exports.withLock { exports in
            let found = name.isEmpty && exports.count == 1 ? exports.first?.value : exports[name]
            return found.flatMap { $0.authorize(peer) ? $0 : nil }
        }
    }

    /// What this peer may use, in the order of the names.
    public func list(for peer: TLSPeer?) -> [Export] {
        exports.withLock { exports in
            exports.values.filter { $0.authorize(peer) }.sorted { $0.name < $1.name }
        }
    }
}
