/// What a peer can hold of a destination agent. `docs/security.md` has the same table for operators.
///
/// An identity is what authorisation knows a peer by. What exceeds a bound is refused with a sentence that names it, or waits for
/// what the same identity has before it; nobody else waits.
enum PeerLimits {
    // MARK: Without a proof of who it is

    /// Connections to the control port that have not said HELLO; the network with the most gives way.
    static let unprovenConnections = 64
    /// How long TLS and HELLO may take.
    static let greeting = Duration.seconds(10)
    /// Bytes of HELLO.
    static let helloBytes = 4 << 10

    // MARK: Of an identity

    /// Connections to the control port.
    static let connections = 256
    /// Connections to the NBD port.
    static let diskConnections = 1024
    /// Bytes of payload that its requests to the NBD port hold; others of its requests wait.
    static let diskPayload = 1 << 30
    /// Connections to one export.
    static let connectionsToExport = 128
    /// Certificates of a member within a time.
    static let (renewals, renewalSpan) = (5, Duration.seconds(300))
    /// Guests that are offered or on their way.
    static let guests = 64
    /// Bytes of messages: those that wait for their turn, and what is kept of them, without short ones.
    static let messageBytes = 64 << 20
    /// Bytes of a message that is short.
    static let shortMessage = 4 << 10
    /// Long messages that are received and decoded at once; others wait.
    static let longMessages = 2
    /// How long a long message may take.
    static let longMessage = Duration.seconds(60)
    /// Blank copies that stand or are being started; others wait.
    static let blankCopies = 8
    /// Digests of files of this host that are reckoned at once; others wait.
    static let digests = 2

    /// Migrations that were refused or given up before everything was here; of earlier ones nothing is kept.
    static let refusedMigrations = 64

    /// Connections for evacuations.
    static let hostConnections = 16
    /// Bytes of a message on such a connection.
    static let hostMessage = 64 << 10
    /// How long such a connection may be silent; its source says something every 3 s.
    static let hostSilence = Duration.seconds(20)
    /// Connections for consoles, those that wait for a refusal among them.
    static let consoles = 64
    /// Bytes of OPEN.
    static let openingBytes = 4 << 10
    /// Guests that room is kept for.
    static let reservations = 256
    /// How long room is kept without being renewed.
    static let reservation = Duration.seconds(3600)
    /// Readings of the host's figures at once; others wait.
    static let figures = 1
    /// Tap interfaces that are made for a guest.
    static let networks = 32
    /// Guests that are asked for at once.
    static let recalledGuests = 256
    /// Guests that go back at once.
    static let recalls = 4
    /// Guests that have or wait for their switchover.
    static let turns = 4

    // MARK: Of all identities

    /// Guests that wait for their switchover.
    static let waitingTurns = 64
    /// How long the turn of a switchover lasts while others wait.
    static let turn = Duration.seconds(120)

    /// Connections to the NBD port that use an export.
    static let allDiskConnections = 4096

    // MARK: Of a migration

    /// Messages that wait for one that is being handled.
    static let waitingMessages = 8
    /// Secrets.
    static let secrets = 256
    /// Bytes of the secrets with their ids.
    static let secretBytes = 256 << 10
    /// Bytes of the guest's command line.
    static let commandLineBytes = 256 << 10
    /// Files that the guest reads, the headers of its containers among them.
    static let files = 256
    /// Bytes of a sentence, in ABORT and OVERRULED; what is longer is cut.
    static let sentenceBytes = 4 << 10
}
