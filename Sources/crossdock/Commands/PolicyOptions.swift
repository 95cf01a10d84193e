import ArgumentParser
import Destination
import Emulator
import IO

/// What guests of other hosts may have here, but for directories.
struct PolicyOptions: ParsableArguments {
    /// The file of the service, which is read when no other one is named and it is there.
    static let defaultFile = "/etc/crossdock/policy"

    @Option(
        name: .customLong("policy"),
        help: ArgumentHelp(
            "A file with rules for guests, 'rule = value' in each line; without it \(defaultFile), if that is there. What flags allow "
                + "is added; the numbers of flags count instead of the file's.",
            valueName: "file"
        )
    )
    var policyFile: String?

    @Option(
        name: .customLong("allow-bridge"),
        help: ArgumentHelp(
            "A bridge that the tap interfaces of guests may be in, or 'all'. May be repeated; without it every tap that is there "
                + "may be used. A tap that is not there is made only in a bridge that is named here, for a source that asks for it.",
            valueName: "name"
        )
    )
    var bridges: [String] = []

    @Option(
        name: .customLong("allow-listen"),
        help: ArgumentHelp(
            "An address of this host on which displays, serial ports and networks of guests may listen, or 'all'. May be repeated; "
                + "loopback addresses are allowed always.",
            valueName: "address"
        )
    )
    var listenAddresses: [String] = []

    @Option(
        name: .customLong("allow-seed"),
        help: ArgumentHelp(
            "A directory with images that this source may name for its disks to begin with (migrate --seed): it gets copies, and learns "
                + "what is in them. The identity is as the log names it. May be repeated.",
            valueName: "identity=dir"
        )
    )
    var seedDirectories: [String] = []

    @Option(help: ArgumentHelp("The memory that the guests of one source may have together: 64G.", valueName: "size"))
    var mostMemory: String?

    @Option(help: ArgumentHelp("The processors that the guests of one source may have together.", valueName: "number"))
    var mostProcessors: String?

    @Option(help: ArgumentHelp("The disk that the guests of one source may have together: 2T.", valueName: "size"))
    var mostDisk: String?

    @Option(help: ArgumentHelp("How many guests of one source may be here and on their way.", valueName: "number"))
    var mostGuests: String?

    @Option(help: ArgumentHelp("How many guests of all sources may be on their way at once.", valueName: "number"))
    var mostIncoming: String?

    @Option(
        name: .customLong("allow-recall"),
        help: ArgumentHelp(
            "An identity, as it is in its certificate, whose guests this host sends back when it asks for them. May be repeated; "
                + "without it nobody's.",
            valueName: "identity"
        )
    )
    var recallers: [String] = []

    @Option(
        name: .customLong("allow-console"),
        help: ArgumentHelp(
            "An identity, as it is in its certificate, whose agent may have the consoles of guests here also when it was given no grant; "
                + "with ' view' behind it only to read. May be repeated; without it only former hosts of a guest may.",
            valueName: "identity[ view]"
        )
    )
    var consoleReaders: [String] = []

    @Option(
        help: ArgumentHelp(
            "What guests reach with networks and disks that connect to others: 'filtered' keeps them from loopback and link-local "
                + "addresses of this host (the default), 'host' does not.",
            valueName: "filtered|host"
        )
    )
    var guestNetwork: String?

    /// Applies the flags.
    func apply(to policy: inout GuestPolicy) throws {
        var said = bridges.map { ("allow-bridge", $0) } + listenAddresses.map { ("allow-listen", $0) }
        said += recallers.map { ("allow-recall", $0) }
        said += consoleReaders.map { ("allow-console", $0) }
        said += seedDirectories.map { ("allow-seed", $0) }
        let single = [
            ("most-memory", mostMemory), ("most-processors", mostProcessors), ("most-disk", mostDisk),
            ("most-guests", mostGuests),
            ("most-incoming", mostIncoming), ("guest-network", guestNetwork),
        ]
        said += single.compactMap { rule, value in value.map { (rule, $0) } }
        for (rule, value) in said {
            do { try policy.apply(rule, value) } catch { throw ValidationError("--\(error)") }
        }
    }

    /// The rules of the file.
    func file() throws -> GuestPolicy {
        let path = policyFile.map { DurableFile.resolve($0, in: currentDirectory) } ?? Self.defaultFile
        guard let bytes = try DurableFile.read(path) else {
            if policyFile == nil { return GuestPolicy() }
            throw GuestError("The policy \(path) is not there")
        }
        return try GuestPolicy(parsing: String(decoding: bytes, as: UTF8.self), file: path)
    }
}
