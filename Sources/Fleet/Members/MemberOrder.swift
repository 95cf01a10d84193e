public import Migration

/// What a pairing has a host do, on that host, by `crossdock pair-member`. Each may be said twice.
public enum MemberOrder: Sendable, Hashable, Codable {
    /// Say what you are; nothing is changed.
    case look
    /// Make keys, and a request for a certificate with this name.
    case request(name: String)
    /// This is the certificate, and its authority's: check them with the keys, and use them.
    case certify(certificate: String, authority: String)
    /// This is the list of the fleet.
    case list(SignedFleetList)
    /// Let the service run; `isNew` when what it reads at its start has changed.
    case serve(isNew: Bool)
    /// Prove that the agent of another host can be reached.
    case prove(address: String)
    /// Bring the agent of another member this list.
    case bring(SignedFleetList, address: String)
    /// All is done: you are a member. For a host that joins with a token.
    case finish
    /// Be no member any more: what was there before the pairing comes back.
    case leave
}

/// What a host answers.
public struct MemberAnswer: Sendable, Hashable, Codable {
    /// What it is, for `look`.
    public var look: MemberLook?
    /// The request, PEM, for `request`.
    public var request: String?
    /// What is to be known, a sentence each.
    public var notes: [String] = []
    /// What was found, for `prove`.
    public var findings: [Finding]?
    /// Why it was not done; nil when it was.
    public var failure: String?

    /// Makes an empty one: it was done.
    public init() {}
}

/// What a host is, for who pairs it.
public struct MemberLook: Sendable, Hashable, Codable {
    /// Crossdock's version.
    public var version: String
    /// The host's name.
    public var name: String
    /// Its clock, in milliseconds since 1970.
    public var clock: Int64
    /// Whether systemd runs there.
    public var hasSystemd: Bool
    /// The fingerprint of the authority that it trusts; nil for none.
    public var authority: String?
    /// The names and addresses of its certificate, each with its kind.
    public var names: [String]
    /// The distinguished name of its certificate; nil without one.
    public var identity: String?
    /// When its certificate ends, in seconds since 1970; nil without one that is good.
    public var ends: Int?
    /// The number of its list; nil for none.
    public var list: UInt64?
    /// Whether a destination agent answers.
    public var isServing: Bool
    /// Free bytes of the file system of /etc.
    public var free: UInt64

    /// Describes a host.
    public init(
        version: String,
        name: String,
        clock: Int64,
        hasSystemd: Bool = false,
        authority: String? = nil,
        names: [String] = [],
        identity: String? = nil,
        ends: Int? = nil,
        list: UInt64? = nil,
        isServing: Bool = false,
        free: UInt64 = .max
    ) {
        self.version = version
        self.name = name
        self.clock = clock
        self.hasSystemd = hasSystemd
        self.authority = authority
        self.names = names
        self.identity = identity
        self.ends = ends
        self.list = list
        self.isServing = isServing
        self.free = free
    }
}
