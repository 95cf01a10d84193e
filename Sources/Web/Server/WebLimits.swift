/// What clients can hold of the web server. `docs/security.md` has the same table for operators.
enum WebLimits {
    /// Connections whose client has shown no right; the network with the most gives way.
    static let unprovenConnections = 128
    /// Connections whose client has.
    static let provenConnections = 768
    /// Of these, from one network.
    static let connectionsOfNetwork = 512
    /// How long TLS may take.
    static let handshake = Duration.seconds(10)
    /// TLS handshakes that are begun in a second; others wait.
    static let handshakes = 100
    /// How long a request's head may take from its first byte, and its body from there.
    static let request = Duration.seconds(10)
    /// How long a connection may be idle.
    static let idle = Duration.seconds(30)
    /// How long an answer may take to go out.
    static let answer = Duration.seconds(30)
    /// Bytes of a request's body.
    static let body = 64 << 10

    /// Tickets that nobody has used yet.
    static let tickets = 64
    /// How long a ticket holds at most.
    static let ticketLife = Duration.seconds(3600)
    /// Sessions; the one that was not used for the longest time goes.
    static let sessions = 256
    /// How long a session lasts.
    static let sessionLife = Duration.seconds(12 * 3600)

    /// Viewers of the feed.
    static let viewers = 256
    /// Of these, of one session or certificate.
    static let viewersOfVisitor = 32
    /// Bytes of events that wait for a viewer; beyond that they are left out.
    static let eventBytes = 256 << 10
    /// How long a viewer may take nothing.
    static let silence = Duration.seconds(30)
    /// How long who was told that it is over may take to go.
    static let farewell = Duration.seconds(5)
    /// Between two pings.
    static let ping = Duration.seconds(20)

    /// Bytes that are kept of what a guest has written to its console.
    static let consoleRing = 1 << 20
    /// Bytes of these that a reader gets who does not say from where.
    static let consoleScrollback = 64 << 10
    /// Bytes that are typed and not taken by the guest yet.
    static let consoleInput = 64 << 10
    /// Readers of all consoles.
    static let consoleReaders = 256
    /// Of these, of one session or user.
    static let consoleReadersOfVisitor = 32
    /// Consoles of guests of other hosts that are asked for by the host's name.
    static let consolesAbroad = 64

    /// Viewers of all screens.
    static let displayViewers = 128
    /// Of these, of one session or user.
    static let displayViewersOfVisitor = 16
    /// Viewers by TLS that have not shown who they are; the network with the most gives way.
    static let unprovenViewers = 64
    /// Bytes of a file of noVNC.
    static let viewerFile = 4 << 20

    /// Actions that are carried out at once.
    static let actions = 4
    /// Bytes of the file of a report, which has a few KiB.
    static let report = 4 << 20
    /// Migrations in the history.
    static let history = 500
}
