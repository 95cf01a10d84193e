import ArgumentParser
import Destination
import Glibc
import IO
import Migration
import NBD
import Source
import TLS

struct DestinationCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "destination",
        abstract: "Receives guests: the destination agent.",
        discussion: "Ends on SIGTERM or SIGINT; guests that run on this host go on running."
    )

    @OptionGroup var common: CommonOptions
    @OptionGroup var security: CredentialOptions

    @Option(help: ArgumentHelp("Where source agents connect; port 0 lets the system choose.", valueName: "host:port"))
    var listen: String = ":\(MessageConnection.port)"

    @Option(help: ArgumentHelp("Where the disks are exported.", valueName: "host:port"))
    var nbdListen: String = ":\(NBDWire.port)"

    @Option(help: "Where disk images are made; STATE-DIR/images when it is not given.")
    var imageDir: String?

    func run() async throws {
        let signals = AsyncStream<Int32>.makeStream()
        SignalWatcher.start([SIGINT, SIGTERM]) { signals.continuation.yield($0) }
        try await failing {
            let state = common.stateDirectory
            let agent = try await DestinationAgent.start(
                .init(
                    listen: SocketAddress(parsing: listen, defaultPort: MessageConnection.port),
                    nbdListen: SocketAddress(parsing: nbdListen, defaultPort: NBDWire.port),
                    imageDirectory: imageDir.map { DurableFile.resolve($0, in: currentDirectory) } ?? "\(state)/images",
                    stateDirectory: state,
                    credentials: security.credentials(.server),
                    log: common.log
                )
            )
            for path in FencedImages.purge(common.migrations) {
                common.log(.info, "deleted \(path), whose time is over")
            }
            output("crossdock destination: listening on \(agent.address), NBD port \(agent.nbdPort)\n")
            for await _ in signals.stream { break }
            await agent.stop()
        }
    }
}
