/// What `crossdock pair` was asked to do.
public struct PairingOrder: Sendable {
    /// The other host.
    public var target: SSHTarget
    /// Its name in the fleet; nil for its own.
    public var name: String?
    /// Its addresses for migrations; empty for the one that SSH reached.
    public var addresses: [String] = []
    /// This host's name in the fleet; nil for its own.
    public var ownName: String?
    /// This host's addresses for migrations; empty for the one that SSH comes from.
    public var ownAddresses: [String] = []
    /// Addresses that the host's name stands for here.
    public var resolved: [String] = []
    /// The package that is installed there; nil to install nothing.
    public var package: String?
    /// Whether only this host sends: the others take no guests of that one.
    public var isOneWay = false
    /// Whether nobody can be asked.
    public var isBatch = false

    /// Names the other host.
    public init(target: SSHTarget) { self.target = target }
}

/// Where a pairing works.
public struct PairingPlace: Sendable {
    /// What this host has of its fleet.
    public var files: FleetFiles
    /// The state directory.
    public var stateDirectory: String
    /// Crossdock's program.
    public var program: String

    /// Names a place.
    public init(files: FleetFiles, stateDirectory: String, program: String) {
        self.files = files
        self.stateDirectory = stateDirectory
        self.program = program
    }
}
