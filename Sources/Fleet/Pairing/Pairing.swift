/// Where a pairing of this host with another one stands, as a value: what is to be done next, and what undoes what was done.
///
/// It is kept durably, and written before each step: whoever finds it knows what may have been done.
public struct Pairing: Sendable, Hashable, Codable {
    /// One step, in the order of their raw values.
    public enum Step: Int, Sendable, Codable, CaseIterable {
        /// The package is installed there.
        case install
        /// An authority is made here.
        case authority
        /// This host gets its certificate.
        case certifyHere
        /// The other host gets its certificate.
        case certifyThere
        /// Both, and all other members, get the list with both.
        case list
        /// The services run.
        case serve
        /// Each proves that it reaches the other.
        case prove

        /// What is done, for the operator.
        public var title: String {
            switch self {
            case .install: "package there"
            case .authority: "authority"
            case .certifyHere: "certificate here"
            case .certifyThere: "certificate there"
            case .list: "list of the fleet"
            case .serve: "services"
            case .prove: "proof"
            }
        }
    }

    /// Where it stands.
    public enum State: String, Sendable, Codable {
        /// It is being done, or was interrupted.
        case underway
        /// The hosts are paired.
        case paired
    }

    /// How the other host is reached for SSH.
    public var target: SSHTarget
    /// The other host.
    public var member: FleetMember
    /// This host.
    public var own: FleetMember
    /// What is to be done, in its order; what needs nothing is left out.
    public private(set) var plan: [Step]
    /// What was begun, the first first: all of it may have been done.
    public private(set) var begun: [Step] = []
    /// What earlier pairings with the host began.
    private var earlier: [Step] = []
    /// Where it stands.
    public private(set) var state = State.underway
    /// Whether the other host had the package before: it stays there.
    public var hadPackage: Bool
    /// Whether the other host has not got the newest list yet.
    public var isBehind = false

    /// Whether the other host joined with a token: SSH may lead nowhere.
    public var isJoined = false

    /// Plans a pairing.
    ///
    /// - Parameter earlier: an earlier one with the same host: what undoes it undoes this one too.
    public init(
        target: SSHTarget,
        member: FleetMember,
        own: FleetMember,
        plan: Set<Step>,
        hadPackage: Bool = true,
        earlier: Pairing? = nil
    ) {
        self.target = target
        self.member = member
        self.own = own
        self.hadPackage = earlier?.hadPackage ?? hadPackage
        self.earlier = earlier.map { $0.earlier + $0.begun } ?? []
        self.plan = plan.sorted { $0.rawValue < $1.rawValue }
    }

    /// What comes next; nil when all is done.
    public var next: Step? { plan.first { !begun.contains($0) } }

    /// Notes that a step is about to be done; write it down before it is.
    public mutating func begin(_ step: Step) { begun.append(step) }

    /// Notes that all is done.
    public mutating func finish() { state = .paired }

    /// What undoes what was begun, now and earlier, in its order.
    public var undoing: [Undo] {
        let all = Set(earlier + begun).sorted { $0.rawValue > $1.rawValue }
        return all.compactMap { step in
            switch step {
            case .install: hadPackage ? nil : .removePackage
            case .authority: .removeAuthority
            case .certifyHere: .leaveHere
            case .certifyThere: .leaveThere
            case .list: .listWithout
            case .serve, .prove: nil
            }
        }
    }

    /// What undoes a step.
    public enum Undo: String, Sendable, Hashable, Codable {
        /// The package is removed there.
        case removePackage
        /// The authority is removed here.
        case removeAuthority
        /// This host's certificates from before come back.
        case leaveHere
        /// The other host's certificates from before come back.
        case leaveThere
        /// All members get a list without the other host.
        case listWithout
    }
}
