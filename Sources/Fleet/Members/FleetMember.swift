/// A host of a fleet: hosts with one authority that know each other.
public struct FleetMember: Sendable, Hashable, Codable {
    /// Its name, the common name of its certificate.
    public var name: String
    /// Further names and addresses that its certificate is for.
    public var addresses: [String]
    /// Whether the others take guests that it sends.
    public var sends: Bool

    /// Describes a member.
    public init(name: String, addresses: [String], sends: Bool = true) {
        self.name = name
        self.addresses = addresses
        self.sends = sends
    }

    /// The distinguished name of its certificate, as authorisation knows it.
    public var identity: String { "CN=\(name)" }

    /// All that its certificate is for.
    public var hosts: [String] {
        var seen: Set<String> = []
        return ([name] + addresses).filter { seen.insert($0).inserted }
    }

    /// Whether a text may be a member's name: a host's, of letters, digits, dots and hyphens.
    public static func isName(_ text: String) -> Bool {
        !text.isEmpty && text.utf8.count <= 64 && !text.hasPrefix("-") && !text.hasPrefix(".")
            && text.utf8.allSatisfy {
                (48...57).contains($0) || (65...90).contains($0) || (97...122).contains($0) || $0 == 45 || $0 == 46
            }
    }
}
