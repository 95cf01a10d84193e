import ArgumentParser
import Glibc
import Migration

struct CordonCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "cordon",
        abstract: "Lets this host take no new guests.",
        discussion: """
            Its destination agent refuses every guest that is offered, rehearsals among them, and reserves no room, with the message; what is \
            on its way goes on. That stays so until 'crossdock uncordon', whatever becomes of the agent and the host.
            """
    )

    @OptionGroup var common: CommonOptions
    @Option(help: ArgumentHelp("Why, for those who are refused.", valueName: "text"))
    var message: String = ""

    func validate() throws {
        guard message.utf8.count <= Cordon.longestMessage else {
            throw ValidationError("--message takes at most \(Cordon.longestMessage) bytes")
        }
    }

    func run() async throws {
        try await failing {
            common.warnOfHostState()
            let cordon = Cordon(by: operatorName, message: message)
            try cordon.write(stateDirectory: common.stateDirectory)
            output("This host takes no new guests, it is \(cordon.sentence).\n")
        }
    }
}

extension CommonOptions {
    /// Says that the agent of this host is another one's, if it is.
    fileprivate func warnOfHostState() {
        guard isBesideHostState else { return }
        printError(
            "crossdock: warning: This is for an agent of \(stateDirectory) only; this host's own has \(Self.hostStateDirectory), for root"
        )
    }
}

struct UncordonCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "uncordon",
        abstract: "Lets this host take guests again."
    )

    @OptionGroup var common: CommonOptions

    func run() async throws {
        try await failing {
            common.warnOfHostState()
            let wasCordoned = try Cordon.remove(stateDirectory: common.stateDirectory)
            output(wasCordoned ? "This host takes guests again.\n" : "This host was not cordoned.\n")
        }
    }
}
