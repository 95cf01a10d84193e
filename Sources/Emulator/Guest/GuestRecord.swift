/// What is known about a guest on this host.
public struct GuestRecord: Sendable, Codable {
    /// Its name.
    public var name: String
    /// Its QEMU command line, as the user wrote it or as it was derived on arrival.
    public var commandLine: GuestCommandLine
    /// The process, once it was started.
    public var process: EmulatorProcess?
    /// Whether the guest is off and its QEMU, which has never run it, is only there while it is moved.
    public var isOff: Bool?
    /// Set once the guest was released to another host: it must not be started here.
    public var released: Release?
    /// The monitor of a guest that something else started; nil for one that Crossdock started.
    public var adopted: String?
    /// The ids of secrets that the command line needs and that are kept nowhere.
    public var secrets: [String]?

    /// How it is confined, if it came from another host; nil for a guest that was described here.
    public var confinement: GuestConfinement?

    /// The tap interfaces that are made for it on this host; nil for none.
    public var taps: [GuestTap]?

    /// Where it came from, and what it takes of this host; nil for a guest that was described here.
    public var arrival: Arrival?

    /// What its operator has said about where it goes; nil when nothing was said.
    public var placement: GuestPlacement?

    /// The host where the guest was at home when it first moved; nil when that is this one.
    public var origin: Origin?

    /// Where a guest was at home before it first moved. It stays the same, wherever the guest goes from there.
    public struct Origin: Sendable, Hashable, Codable {
        /// Who that host proved to be, to this one or to the one that tells.
        public var identity: String
        /// The address that it came from; nil when none is known.
        public var address: String?
        /// Who told this host; nil when the guest came here straight from its home, so that this host saw the identity proved.
        public var toldBy: String?

        /// Describes an origin.
        public init(identity: String, address: String? = nil, toldBy: String? = nil) {
            self.identity = identity
            self.address = address
            self.toldBy = toldBy
        }

        /// Whether an identity that this host has seen proved is the guest's home.
        public func isProven(for identity: String) -> Bool { toldBy == nil && self.identity == identity }

        /// Whether what another host tells looks like what it should be: one line each, of at most 1024 and 255 bytes.
        public var isPlausible: Bool {
            !identity.isEmpty && identity.utf8.count <= 1024 && PeerText.isPlain(identity)
                && (address.map { $0.utf8.count <= 255 && PeerText.isPlain($0) } ?? true)
        }
    }

    /// The lineages of its disks by the path of the image, the latest last: what old images of them on other hosts are known by.
    /// Secret: who knows them is told what is in those images.
    public var lineages: [String: [String]]?

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
