/// What is known about a guest on this host.
public struct GuestRecord: Sendable, Codable {
    /// Its name.
    public var name: String
    /// Its QEMU command line, as the user wrote it or as it was derived on arrival.
    public var commandLine: GuestCommandLine
    /// The process, once it was started.
    public var process: EmulatorProcess?
    /// Set once the guest was released to another host: it must not be started here.
    public var released: Release?
    /// The monitor of a guest that something else started; nil for one that Crossdock started.
    public var adopted: String?
    /// The ids of secrets that the command line needs and that are kept nowhere.
    public var secrets: [String]?

    /// How it is confined, if it came from another host; nil for a guest that was described here.
    public var confinement: GuestConfinement?

    /// Where it came from, and what it takes of this host; nil for a guest that was described here.
    public var arrival: Arrival?

    /// That the guest came from another host.
    public struct Arrival: Sendable, Hashable, Codable {
        /// Who the source proved to be.
        public var source: String
        /// What the guest takes of this host.
        public var usage: GuestUsage

        /// Describes an arrival.
        public init(source: String, usage: GuestUsage) {
            self.source = source
            self.usage = usage
        }
    }

    /// That the guest has left.
    public struct Release: Sendable, Codable {
        /// The migration.
        public var migration: String
        /// The host.
        public var destination: String

        /// Makes a release.
        public init(migration: String, destination: String) {
            self.migration = migration
            self.destination = destination
        }
    }

    /// Makes a record.
    public init(name: String, commandLine: GuestCommandLine, process: EmulatorProcess? = nil) {
        self.name = name
        self.commandLine = commandLine
        self.process = process
    }
}
