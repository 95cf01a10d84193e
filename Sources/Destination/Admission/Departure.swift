/// A guest that is to be sent back to the host that it came from.
public struct Departure: Sendable, Hashable {
    /// The guest's name.
    public var guest: String
    /// The host, for which its agent's certificate must be.
    public var host: String
    /// The control port of its agent.
    public var port: UInt16
    /// Who that agent must prove to be besides.
    public var identity: String
    /// The bridges of that host, by those of this one.
    public var networks: [String: String]?
}

/// Begins to move a guest away with a source agent of its own, which goes on whatever becomes of this one: what moves guests away does
/// not belong to a destination agent. Blocks.
///
/// It gets the guest, and is to say, from any thread, that the migration is over: once, whatever became of it, with the reason when the guest
/// has not left. It returns the migration's id, and throws when nothing was begun.
public typealias SendAway =
    @Sendable (_ guest: Departure, _ ended: @escaping @Sendable (_ failure: String?) -> Void) throws -> String
