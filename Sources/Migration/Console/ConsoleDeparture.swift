internal import Emulator
internal import IO

/// Where a guest has gone from this host, and what opens its consoles there: a durable file of the state directory with mode 0600, which the source
/// agent writes. This type alone knows the file's name and format.
public struct ConsoleDeparture: Sendable, Hashable, Codable {
    /// The guest.
    public var guest: String
    /// The host, for which its agent's certificate must be.
    public var host: String
    /// The control port of its agent.
    public var port: UInt16
    /// Who that agent has proved to be; nil for anybody whom the credentials trust.
    public var identity: String?
    /// What was given to it with the guest; nil for a guest that was not sent from here.
    public var grant: ConsoleGrant?

    /// Describes a departure.
    public init(guest: String, host: String, port: UInt16, identity: String? = nil, grant: ConsoleGrant? = nil) {
        (self.guest, self.host, self.port, self.identity, self.grant) = (guest, host, port, identity, grant)
    }

    private static func directory(_ stateDirectory: String) -> String { "\(stateDirectory)/departures" }
    /// The file of a guest.
    public static func path(of guest: String, stateDirectory: String) -> String {
        "\(directory(stateDirectory))/\(guest).json"
    }

    /// Where a guest has gone; nil when that is not known. Blocks.
    ///
    /// - Throws: `FileError` when the file cannot be read, `GuestError` for what is no name of a guest.
    public static func read(_ guest: String, stateDirectory: String) throws -> ConsoleDeparture? {
        try GuestStore.validate(guest)
        let bytes = try DurableFile.read(path(of: guest, stateDirectory: stateDirectory), limit: 64 << 10)
        guard let departure = bytes.flatMap({ JSONText.decode(ConsoleDeparture.self, from: $0) }),
            departure.guest == guest
        else { return nil }
        return departure
    }

    /// Notes it durably, in the place of an earlier one. Blocks.
    ///
    /// - Throws: `FileError`, `GuestError`.
    public func write(stateDirectory: String) throws {
        try GuestStore.validate(guest)
        try DurableFile.makeDirectory(Self.directory(stateDirectory))
        let path = Self.path(of: guest, stateDirectory: stateDirectory)
        try DurableFile.write(try JSONText.encode(self), to: path)
    }

    /// The guest is here, or is forgotten here. Blocks.
    public static func remove(_ guest: String, stateDirectory: String) {
        guard (try? GuestStore.validate(guest)) != nil else { return }
        DurableFile.remove(path(of: guest, stateDirectory: stateDirectory))
    }
}
