import ArgumentParser
import Emulator
import FoundationEssentials
import Glibc
import IO
import Migration
import Source

struct RestoreCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "restore",
        abstract: "Brings back the guests that an evacuation moved away from this host.",
        discussion: """
            The hosts that have them are asked to send them back. They do so when their policy has allow-recall with the name that this \
            host's certificate carries, and only to an agent that proves to be this host. What an old image here still has is not sent.

            Exit codes: 0 everyone is home; 20 some stay away, each with its reason.
            """
    )

    @Argument(
        help: ArgumentHelp("Only what this host has, and all that is at home here.", valueName: "host[:port]")
    )
    var host: String?

    @OptionGroup var common: CommonOptions
    @OptionGroup var security: CredentialOptions

    @Flag(help: "Only ask who may come.")
    var dryRun = false

    @Option(help: ArgumentHelp("This one stays away. May be repeated.", valueName: "guest"))
    var skip: [String] = []

    @Option(
        help: ArgumentHelp(
            "Where the others reach the agent of this host, whose certificate must be for it; this host's name without it.",
            valueName: "host[:port]"
        )
    )
    var address: String?

    @OptionGroup var networks: NetworkOptions

    @Flag(help: "Print JSON, one guest a line.")
    var json = false

    func validate() throws { _ = try networks.bridges() }

    func run() async throws {
        try await failing {
            try common.checkAccess()
            if !dryRun { try EvacuationProcess.refuseSecond(stateDirectory: common.stateDirectory) }
            let isCordoned = try openHost()
            let homecoming = Homecoming(
                stateDirectory: common.stateDirectory,
                address: address ?? ProcessInfo.processInfo.hostName,
                skipping: skip,
                networks: try networks.bridges(),
                onlyAsks: dryRun,
                credentials: security.selection,
                directory: currentDirectory
            ) { [json] in Self.show($0, json) }
            var guests: [Homecoming.Guest] = []
            if let host {
                guests = try await homecoming.bring(from: try EvacuationOrder.Target(argument: host), nil)
            } else {
                let places = try homecoming.whereabouts()
                let names = Set(places.values.joined())
                if let unknown = try skip.first(where: { try !names.contains($0) && common.guests.load($0) == nil }) {
                    throw MigrationError(
                        .guest,
                        "There is no guest '\(unknown)' to be skipped; away are: \(names.sorted().joined(separator: ", "))"
                    )
                }
                if places.isEmpty {
                    return output(
                        "No evacuation of this host has moved a guest that is still away; name a host to ask it.\n"
                    )
                }
                for (target, names) in places.sorted(by: { $0.key.description < $1.key.description }) {
                    do { guests += try await homecoming.bring(from: target, names) } catch {
                        printError("crossdock: \(error)")
                        for name in names where !skip.contains(name) {
                            guests.append(Homecoming.Guest(away: name, on: target, reason: "its host was not asked"))
                            Self.show(guests[guests.count - 1], json)
                        }
                    }
                }
            }
            if dryRun, isCordoned {
                printError("crossdock: This host is cordoned; 'crossdock restore' without --dry-run ends that")
            }
            let away = guests.filter { $0.state == .away }
            if !dryRun, !json { output("\(guests.count { $0.state == .home }) of \(guests.count) guests are home.\n") }
            if !away.isEmpty { throw ExitCode(20) }
        }
    }

    /// The cordon of an evacuation ends with what comes home; one of the operator's own does not.
    private func openHost() throws -> Bool {
        guard let cordon = try Cordon.read(stateDirectory: common.stateDirectory) else { return false }
        if dryRun { return true }
        guard cordon.by == EvacuateCommand.cordoner else {
            throw MigrationError(
                .refused,
                "This host takes no guests, it is \(cordon.sentence); 'crossdock uncordon' ends that"
            )
        }
        try Cordon.remove(stateDirectory: common.stateDirectory)
        if !json { printError("crossdock: This host takes guests again") }
        return true
    }

    private static func show(_ guest: Homecoming.Guest, _ json: Bool) {
        if json {
            if let data = try? JSONText.encode(guest) { output(String(decoding: data, as: UTF8.self) + "\n") }
            return
        }
        let words =
            switch guest.state {
            case .mayCome: "\(guest.host) would send it; whether it fits here is rehearsed when it comes"
            case .waiting: "waits on \(guest.host): \(guest.reason ?? "it may come later")"
            case .coming: "comes from \(guest.host)"
            case .home: "is home"
            case .away: "does not come from \(guest.host): \(guest.reason ?? "")"
            }
        output("\(guest.name)  \(words)\n")
    }
}
