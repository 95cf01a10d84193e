internal import IO
internal import TLS

/// By which door somebody came.
enum WebDoor: Sendable, Hashable {
    /// TLS, for browsers.
    case secure
    /// The Unix socket: who may open it may act.
    case local
    /// The Unix socket that each agent has for its own commands: the same users, and consoles only.
    case command
    /// Plain HTTP on loopback, for figures only.
    case plain

    var scheme: WebScheme { self == .secure ? .https : .http }
    /// Whether it is a Unix socket.
    var isLocal: Bool { self == .local || self == .command }
}

/// One connection, as the answers need to know it.
struct Visit: Sendable {
    let door: WebDoor
    /// The socket below, by which the connection is counted.
    let socket: SocketChannel
    /// Who the client's certificate says that it is; nil without one.
    let certificate: TLSPeer?
    /// The user of the other end of a Unix socket.
    let user: String?
    /// The address that the connection came to.
    let local: SocketAddress?

    var peerName: String { door.isLocal ? "the local user \(user ?? "?")" : socket.peerName }
}

/// What gives somebody a right.
struct Presence: Sendable {
    /// Who it is, and what that gives.
    let grant: WebGrant
    /// The session behind a cookie; nil for a certificate and for a local user.
    let session: UInt64?
    /// How long it lasts, if it ends by itself.
    let expires: ContinuousClock.Instant?
    /// Whom it counts for.
    var visitor: String { session.map { "session \($0)" } ?? grant.name }
}
