/// Why a migration ended, in a form that scripts can rely on.
public struct MigrationError: Error, Sendable, CustomStringConvertible {
    /// The kind of failure; the raw value is the exit code of `crossdock migrate`.
    public enum Code: Int32, Sendable, Codable {
        /// Something that has no code of its own.
        case failed = 15
        /// The guest is unknown here, does not run, or cannot be moved.
        case guest = 10
        /// The destination cannot be reached, or is no destination agent.
        case unreachable = 11
        /// Credentials cannot be loaded, or TLS with the destination failed.
        case security = 12
        /// The destination checked the offer and refused it.
        case refused = 13
        /// The guest writes faster than the link carries.
        case notConverged = 14
        /// Who owns the guest is not known to this side.
        case undecided = 16
        /// The guest is being migrated already.
        case busy = 17
        /// The user asked for a roll-back.
        case cancelled = 18
        /// The guest runs on the destination, but a disk's digests differ.
        case mismatch = 19
    }

    /// The kind.
    public let code: Code
    /// What happened, to what, and what to do, as sentences without a final full stop.
    public let message: String
    /// What checks have found against the guest, each by itself; empty for other failures.
    public let obstacles: [Obstacle]

    /// Makes an error.
    @inline(never)
    public init(_ code: Code, _ message: String, obstacles: [Obstacle] = []) {
        self.code = code
        self.message = message
        self.obstacles = obstacles
    }

    /// The message.
    public var description: String { message }
}
