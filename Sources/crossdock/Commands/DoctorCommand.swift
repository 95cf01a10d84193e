import ArgumentParser
import Emulator
import IO
import Migration
import Source
import TLS

struct DoctorCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "doctor",
        abstract: "Finds out what would keep guests from moving, before they are to.",
        discussion: """
            Without a host it looks at this one. With a host, that host's agent looks at itself too, and both at the way between them. \
            A guest is rehearsed as at the beginning of every migration: what passes here migrates. Nothing is changed without --fix, \
            which mends only what is Crossdock's own.

            Exit codes: 0 nothing fails, warnings included; 24 something fails.
            """
    )

    @Argument(help: ArgumentHelp("The host that guests would go to.", valueName: "host[:port]"))
    var host: String?

    @OptionGroup var common: CommonOptions
    @OptionGroup var security: CredentialOptions

    @Option(
        name: .customLong("guest"),
        help: ArgumentHelp("A guest that would go there. May be repeated.", valueName: "name")
    )
    var guests: [String] = []

    @Option(help: "Where disk images are made; STATE-DIR/images when it is not given.")
    var imageDir: String?

    @Option(
        help: ArgumentHelp(
            "Where the other host reaches this host's agent; this host's name when it is not given, 'none' to leave that out.",
            valueName: "host[:port]"
        )
    )
    var address: String?

    @Flag(help: "Measure how fast the disks of the image directories write: a second, 256 MiB at most.")
    var measureDisks = false

    @Flag(help: "Mend what is Crossdock's own on this host: keys that others can read, sockets that nobody listens on.")
    var fix = false

    @Flag(help: "Print JSON.")
    var json = false

    func validate() throws {
        guard guests.isEmpty || host != nil else {
            throw ValidationError("--guest needs the host that the guest would go to")
        }
    }

    /// Something keeps guests from moving.
    private static let failed = ExitCode(24)

    func run() async throws {
        try await failing {
            var examination = HostExamination(
                stateDirectory: common.stateDirectory,
                imageDirectory: imageDir.map { DurableFile.resolve($0, in: currentDirectory) },
                credentials: security.selection.directory
                    ?? (security.tlsCreds == nil ? CredentialSelection.ownDirectory : nil)
            )
            examination.measuresDisk = measureDisks
            if fix {
                let host = examination
                for sentence in await BlockingPool.shared.value({ host.mend() }) where !json {
                    output("\(sentence).\n")
                }
            }
            var order = Doctor.Order(host: examination, credentials: security.selection)
            order.target = try host.map { try EvacuationOrder.Target(parsing: $0) }
            order.guests = guests
            order.ownAddress = address == "none" ? nil : address ?? HostExamination.ownName
            let isQuiet = json
            let findings = await Doctor.examine(order) { if !isQuiet { printError("crossdock: \($0)") } }
            let hasFailed = findings.contains { $0.result == .fail }
            output(
                json ? try DoctorReport(host: host, findings: findings).text : FindingView.table(findings, there: host)
            )
            if hasFailed { throw Self.failed }
        }
    }
}
