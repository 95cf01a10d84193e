import ArgumentParser

/// What qemu-nbd does and `nbd serve` does not: each option is refused with the reason, and what does it instead.
struct ForeignServerOptions: ParsableArguments {
    @Flag(name: [.customShort("L"), .customLong("list")], help: .hidden)
    var list = false
    @Flag(name: [.customShort("s"), .customLong("snapshot")], help: .hidden)
    var snapshot = false
    @Option(name: [.customShort("l", allowingJoined: true), .customLong("load-snapshot")], help: .hidden)
    var loadSnapshot: String?
    @Option(name: [.customShort("c", allowingJoined: true), .customLong("connect")], help: .hidden)
    var connect: String?
    @Flag(name: [.customShort("d"), .customLong("disconnect")], help: .hidden)
    var disconnect = false
    @Option(name: [.customShort("P", allowingJoined: true), .customLong("partition")], help: .hidden)
    var partition: String?
    @Flag(name: [.customShort("V")], help: .hidden)
    var showsVersion = false

    func validate() throws {
        if showsVersion { throw CleanExit.message(Crossdock.configuration.version) }
        let refusals = [
            (list, "-L (--list) is a client's: 'crossdock nbd info --list nbd://HOST/' lists the exports of a server"),
            (
                snapshot,
                "-s (--snapshot) would keep writes in a file that is gone afterwards; make one with 'qemu-img create -f qcow2 -F FORMAT -b "
                    + "FILE NEW.qcow2' and serve that, or serve with --read-only"
            ),
            (
                loadSnapshot != nil,
                "-l (--load-snapshot) reads an internal snapshot; serve a copy of it: 'qemu-img convert -l SNAPSHOT -O qcow2 FILE NEW.qcow2'"
            ),
            (
                connect != nil || disconnect,
                "-c (--connect) and -d (--disconnect) need the kernel's client, which nbd-client sets up: 'nbd-client HOST -N EXPORT /dev/nbd0'"
            ),
            (
                partition != nil,
                "-P (--partition) is gone from qemu-nbd, too; --offset and --export with size= serve a part of an image"
            ),
        ]
        if let refusal = refusals.first(where: \.0) { throw ValidationError(refusal.1) }
    }
}
