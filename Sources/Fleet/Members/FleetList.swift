internal import IO
public import TLS

/// Who belongs to a fleet, numbered: a later list has a higher number, and is never replaced by an earlier one.
public struct FleetList: Sendable, Hashable, Codable {
    /// How many lists there were before it, and one.
    public var number: UInt64
    /// The members, by their names.
    public var members: [FleetMember]
    /// The name of the member that has the authority's key, and renews certificates; nil when that is not known.
    public var keeper: String?

    /// Makes a list.
    public init(number: UInt64, members: [FleetMember], keeper: String? = nil) {
        self.number = number
        self.members = members
        self.keeper = keeper
    }

    /// The next list, with a member added or in the place of its earlier entry.
    public func with(_ member: FleetMember) -> FleetList {
        let others = members.filter { $0.name != member.name }
        return FleetList(number: number + 1, members: (others + [member]).sorted { $0.name < $1.name }, keeper: keeper)
    }

    /// The next list, without a member.
    public func without(_ name: String) -> FleetList {
        FleetList(number: number + 1, members: members.filter { $0.name != name }, keeper: keeper)
    }

    /// What an `authz-list-file` says of it: those who send may send, and nobody else.
    public var authorization: [UInt8] {
        get throws {
            struct File: Encodable {
                struct Rule: Encodable {
                    var match: String
                    var policy = "allow"
                }
                var rules: [Rule]
                var policy = "deny"
            }
            return try JSONText.encode(
                File(rules: members.filter(\.sends).map { File.Rule(match: $0.identity) }),
                pretty: true
            )
        }
    }

    /// Signs the list.
    public func signed(by authority: CertificateAuthority) throws -> SignedFleetList {
        let bytes = try JSONText.encode(self)
        return SignedFleetList(
            list: String(decoding: bytes, as: UTF8.self),
            signature: Base64.encode(try authority.sign(bytes))
        )
    }
}

/// A list with the authority's signature: whoever brings it, it counts.
public struct SignedFleetList: Sendable, Hashable, Codable {
    /// The list, JSON, byte for byte what was signed.
    public var list: String
    /// The signature, Base64.
    public var signature: String

    /// Makes one of its parts.
    public init(list: String, signature: String) {
        self.list = list
        self.signature = signature
    }

    /// What it says.
    ///
    /// - Parameter authority: the authority's certificate, PEM.
    /// - Throws: `FleetError` when the authority has not signed it.
    public func verified(by authority: [UInt8]) throws -> FleetList {
        guard let signature = Base64.decode(signature.utf8),
            try CertificateAuthority.verify(signature, of: Array(list.utf8), by: authority)
        else { throw FleetError("The list of the fleet is not signed by the authority of this host") }
        return try read
    }

    /// What it says, without a look at the signature: for who has made it.
    public var read: FleetList {
        get throws {
            guard let read = JSONText.decode(FleetList.self, from: Array(list.utf8)) else {
                throw FleetError("The list of the fleet cannot be read")
            }
            return read
        }
    }
}
