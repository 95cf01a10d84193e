/// What somebody may do on the page of an agent.
public struct WebRights: OptionSet, Sendable, Hashable {
    /// The bits.
    public let rawValue: UInt8
    /// Makes a set from bits.
    public init(rawValue: UInt8) { self.rawValue = rawValue }
    /// Sees what happens.
    public static let view = WebRights(rawValue: 1 << 0)
    /// Changes something: moves, cancels, cordons.
    public static let act = WebRights(rawValue: 1 << 1)

    /// The names, as the page knows them.
    var names: [String] {
        var names: [String] = []
        if contains(.view) { names.append("view") }
        if contains(.act) { names.append("act") }
        return names
    }
}

/// Who somebody is, and what that gives.
public struct WebGrant: Sendable, Hashable {
    /// The name, for logs and the page.
    public var name: String
    /// What may be done.
    public var rights: WebRights
    /// The only guest that it is about; nil for the whole host.
    public var guest: String?
    /// Whether guests are named to it.
    public var namesGuests = true

    /// Makes a grant.
    public init(name: String, rights: WebRights, guest: String? = nil) {
        self.name = name
        self.rights = rights
        self.guest = guest
    }
}

/// Which guests somebody is told of.
enum Audience: Sendable, Hashable {
    /// All.
    case everybody
    /// One.
    case guest(String)
    /// None: the host alone.
    case nobody

    /// That of a grant.
    init(_ grant: WebGrant) { self = grant.guest.map { .guest($0) } ?? (grant.namesGuests ? .everybody : .nobody) }

    /// Whether it is told of a guest.
    func includes(_ guest: String) -> Bool {
        switch self {
        case .everybody: true
        case .guest(let name): name == guest
        case .nobody: false
        }
    }
}
