internal import IO

/// The pairings of this host: `pairings/NAME.json` of the state directory.
public struct PairingStore: Sendable {
    private let directory: String

    /// Names the store of a state directory.
    public init(stateDirectory: String) { directory = "\(stateDirectory)/pairings" }

    private func path(_ name: String) -> String { "\(directory)/\(name).json" }

    /// All of them, by name. Blocks.
    ///
    /// - Throws: `FleetError` for one that is damaged.
    public func all() throws -> [Pairing] {
        try DurableFile.list(directory).filter { $0.hasSuffix(".json") }.map { name in
            guard let bytes = try DurableFile.read("\(directory)/\(name)", limit: 1 << 20),
                let pairing = JSONText.decode(Pairing.self, from: bytes)
            else { throw FleetError("\(directory)/\(name) is damaged; remove it, and pair the host again") }
            return pairing
        }
    }

    /// The pairing with a host, by its name or by what it was called for SSH; nil when there is none. Blocks.
    public func find(_ host: String) throws -> Pairing? {
        let target = try? SSHTarget(parsing: host)
        return try all().first { pairing in
            pairing.member.name == host || pairing.target.destination == host
                || target.map { $0.host == pairing.target.host && $0.port == pairing.target.port } == true
        }
    }

    /// Writes one, durably. Blocks.
    public func write(_ pairing: Pairing) throws {
        try DurableFile.makeDirectory(directory)
        try DurableFile.write(try JSONText.encode(pairing, pretty: true), to: path(pairing.member.name))
    }

    /// Forgets one. Blocks.
    public func remove(_ pairing: Pairing) throws {
        DurableFile.remove(path(pairing.member.name))
        try DurableFile.syncDirectory(of: path(pairing.member.name))
    }

    /// Keeps other pairings of this host away; nil when one is under way.
    public func lock() throws -> PairingLock? {
        try DurableFile.makeDirectory(directory)
        return try PairingLock("\(directory)/.lock")
    }
}
