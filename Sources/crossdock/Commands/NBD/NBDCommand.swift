import ArgumentParser

/// NBD on its own: what qemu-nbd, nbdcopy and nbdinfo do, and a judge of servers.
struct NBDCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "nbd",
        abstract: "Serves, copies, examines and judges NBD exports.",
        subcommands: [NBDServeCommand.self, NBDCopyCommand.self, NBDInfoCommand.self, NBDConformCommand.self]
    )
}
