/// What is known of one option of QEMU: the only place that says so.
///
/// An option has one rule, in the file of its family, and one row in `docs/guests.md`; what has no rule is taken from nobody else.
public struct OptionRule: Sendable {
    /// What follows the option's name.
    public enum Argument: Sendable, Hashable {
        /// Nothing.
        case none
        /// A text of its own form.
        case text
        /// `key=value,...`, where the first value may stand without the key `implied`; with `isJSON` also a JSON object.
        case settings(implied: String?, isJSON: Bool)

        /// `key=value,...`
        static func settings(_ implied: String? = nil) -> Argument { .settings(implied: implied, isJSON: false) }
        /// `key=value,...` or a JSON object.
        static func object(_ implied: String? = nil) -> Argument { .settings(implied: implied, isJSON: true) }
    }

    /// Whose command line may have it.
    public enum Owner: Sendable, Hashable {
        /// Also one that another host sent.
        case anyone
        /// Only that of a guest that is started on this host; with the reason.
        case own(String)
        /// None that shall ever move; with the reason.
        case nobody(String)
    }

    /// What becomes of it on another host.
    enum Relocation {
        /// It is written as it was read and placed.
        case written
        /// There is nothing like it there.
        case leftOut
        /// It becomes these.
        case replaced([GuestOption])
    }

    /// What a blank copy of the guest has of it.
    public enum Blank: Sendable {
        /// The same.
        case kept
        /// Nothing.
        case leftOut
        /// Something that looks the same to the guest, with nothing behind it.
        case emptied(@Sendable (inout BlankCopy, ParsedOption) throws -> Void)
    }

    /// Its names without dashes, with the same meaning.
    public let names: [String]
    /// What follows it.
    public let argument: Argument
    /// Whose command line may have it.
    public let owner: Owner
    /// What a blank copy has of it.
    public let blank: Blank
    /// Keys that may be given several times, with a meaning for each.
    let repeatable: Set<String>
    /// Looks at an option that another host sent, once it was read.
    let check: @Sendable (ParsedOption) throws -> Void
    /// Places it on this host.
    let relocate: @Sendable (inout ParsedOption) throws -> Relocation
    /// The addresses of the network that QEMU uses because of it.
    let endpoints: @Sendable (ParsedOption) throws -> [GuestEndpoint]
    /// The devices and files of the host that QEMU opens because of it, besides those that are placed.
    let hostFiles: @Sendable (ParsedOption) -> [Confinement.Rule]

    init(
        _ names: String...,
        argument: Argument = .text,
        owner: Owner = .anyone,
        repeatable: Set<String> = [],
        blank: Blank = .kept,
        check: @escaping @Sendable (ParsedOption) throws -> Void = { _ in },
        relocate: @escaping @Sendable (inout ParsedOption) throws -> Relocation = { _ in .written },
        endpoints: @escaping @Sendable (ParsedOption) throws -> [GuestEndpoint] = { _ in [] },
        hostFiles: @escaping @Sendable (ParsedOption) -> [Confinement.Rule] = { _ in [] }
    ) {
        self.names = names
        self.argument = argument
        self.owner = owner
        self.repeatable = repeatable
        self.blank = blank
        self.check = check
        self.relocate = relocate
        self.endpoints = endpoints
        self.hostFiles = hostFiles
    }

    /// Every rule.
    public static let all: [OptionRule] =
        machine + disks + characters + network + objects + displays

    private static let byName: [String: OptionRule] = {
        var rules: [String: OptionRule] = [:]
        for rule in all {
            for name in rule.names {
                precondition(rules.updateValue(rule, forKey: name) == nil, "-\(name) has two rules")
            }
        }
        return rules
    }()

    /// The rule of an option; nil for one that is not known.
    static func of(_ name: String) -> OptionRule? { byName[name] }

    /// Rules of options that say the same of all of them.
    static func each(
        _ names: String,
        argument: Argument,
        owner: Owner = .anyone,
        blank: Blank = .kept,
        check: @escaping @Sendable (ParsedOption) throws -> Void = { _ in },
        relocate: @escaping @Sendable (inout ParsedOption) throws -> Relocation = { _ in .written },
        endpoints: @escaping @Sendable (ParsedOption) throws -> [GuestEndpoint] = { _ in [] },
        hostFiles: @escaping @Sendable (ParsedOption) -> [Confinement.Rule] = { _ in [] }
    ) -> [OptionRule] {
        names.split(separator: " ").map {
            OptionRule(
                String($0),
                argument: argument,
                owner: owner,
                blank: blank,
                check: check,
                relocate: relocate,
                endpoints: endpoints,
                hostFiles: hostFiles
            )
        }
    }

    static let unknown = "what it does to another host is not known"
    static func leaveOut(_ option: inout ParsedOption) -> Relocation { .leftOut }
    /// Left out on another host only.
    static func leaveBehind(_ option: inout ParsedOption) -> Relocation { option.isAtHome ? .written : .leftOut }
}
