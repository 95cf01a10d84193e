/// What is looked at before a guest moves, by `crossdock doctor` and by the rehearsal that every migration begins with. Scripts may rely on
/// the raw values.
public enum Check: String, Sendable, Hashable, CaseIterable {
    /// The guest's processor can be had on the other host.
    case processor
    /// Its machine type, and all that it consists of.
    case machine
    /// QEMU and what belongs to it are installed.
    case programs
    /// The hosts have names that lead to them.
    case name
    /// The certificates are good, for these names and both ends.
    case certificate
    /// The agents and their NBD servers can be reached, in both directions.
    case ports
    /// Packets of the interface's size get through.
    case mtu
    /// The bridges, taps and addresses of the guest's networks are there, and allowed.
    case network
    /// The files that the guest reads are there or can be sent, and its images can be made.
    case files
    /// There is room for its disks.
    case space
    /// There is memory for it.
    case memory
    /// Guests that come can be confined.
    case confinement
    /// The clocks agree.
    case clock
    /// Its devices can move.
    case devices
    /// The ports of its displays and serial lines are free.
    case listeners
    /// Nothing is left over that is in the way.
    case leftovers = "left-overs"
    /// It changes less than the link carries.
    case convergence
    /// QEMU itself has nothing against it.
    case blockers
    /// The network learns where the guest is.
    case announcement
    /// The agents understand each other, and take guests.
    case agent
    /// How fast the images' file system writes.
    case diskRate = "disk-rate"
    /// What the kernel gives to guests.
    case kernel
    /// What the operator of the other host allows.
    case policy
    /// What else the rehearsal has shown.
    case rehearsal

    /// What it is about, in a few words.
    public var title: String {
        switch self {
        case .processor: "the guest's processor"
        case .machine: "the guest's machine"
        case .programs: "QEMU"
        case .name: "names of the hosts"
        case .certificate: "certificates"
        case .ports: "ports"
        case .mtu: "packet size"
        case .network: "the guest's networks"
        case .files: "files and images"
        case .space: "room for disks"
        case .memory: "memory"
        case .confinement: "confinement"
        case .clock: "clocks"
        case .devices: "the guest's devices"
        case .listeners: "ports of guests"
        case .leftovers: "left-overs"
        case .convergence: "rate and changes"
        case .blockers: "what QEMU says"
        case .announcement: "announcement"
        case .agent: "agents"
        case .diskRate: "rate of disks"
        case .kernel: "KVM and limits"
        case .policy: "policy"
        case .rehearsal: "rehearsal"
        }
    }
}

extension Check: Codable {
    /// Decodes a name; one of a later version is taken for the rehearsal's.
    public init(from decoder: any Decoder) throws {
        self = Self(rawValue: try decoder.singleValueContainer().decode(String.self)) ?? .rehearsal
    }
}
