internal import IO

/// How a guest that came from another host is confined here. It is kept with the guest: whoever starts it again does so in the
/// same way.
public struct GuestConfinement: Sendable, Hashable, Codable {
    /// The host's policy when the guest came.
    public var policy: ConfinementPolicy
    /// The directory of its images. What is put there later can be attached.
    public var imageDirectory: String
    /// Further files that it reads: images under its disks.
    public var files: [String]
    /// Whether its QEMU can filter system calls.
    public var filtersSystemCalls: Bool

    /// Describes a confinement.
    public init(
        policy: ConfinementPolicy,
        imageDirectory: String,
        files: [String] = [],
        filtersSystemCalls: Bool = true
    ) {
        self.policy = policy
        self.imageDirectory = imageDirectory
        self.files = files
        self.filtersSystemCalls = filtersSystemCalls
    }

    /// Whether files and privileges are confined, and not only system calls.
    public var isInForce: Bool { policy.strictness != .off }

    /// The rules of one start.
    ///
    /// - Parameters:
    ///   - commandLine: what QEMU gets.
    ///   - run: the directory of what QEMU makes.
    ///   - sockets: the directory in which it makes the sockets of its monitors.
    /// - Throws: `GuestError` naming a program that is not there, or an option.
    func confinement(_ commandLine: GuestCommandLine, run: String, sockets: String) throws -> Confinement? {
        guard isInForce else { return nil }
        let program = try ProgramFiles(commandLine.program, withData: true)
        var rules = Confinement.common + program.rules + Self.names
        rules.append(.init(run, .directory))
        rules.append(.init(sockets, [.makeSocket, .removeFile]))
        rules.append(.init(imageDirectory, .directory, isOptional: true))
        var owned = [run, sockets, imageDirectory]
        var readable: [String] = []
        for reference in try commandLine.paths() {
            let path = DurableFile.resolve(reference.path, in: commandLine.directory)
            switch reference.kind {
            case .disk:
                rules.append(.init(path, GuestDevice.path(of: path) != nil ? .device : .image, isOptional: true))
            case .file, .backing:
                rules.append(.init(path, .read, isOptional: true))
                if path.hasPrefix("\(imageDirectory)/") { owned.append(path) }
            case .directory:
                rules.append(.init(path, .reading, isOptional: true))
                readable += DurableFile.list(path).map { "\(path)/\($0)" }
            // They are in the guest's own directory.
            case .output: continue
            }
        }
        rules += files.map { .init($0, .read) }
        rules += policy.directories.map { .init($0, .reading, isOptional: true) }
        rules += try commandLine.hostFiles()
        rules.append(.init("/dev/userfaultfd", .device, isOptional: true))
        var confinement = Confinement(rules)
        confinement.ports = try commandLine.listeningPorts()
        if commandLine.locksMemory { confinement.lockedBytes = 1 << 46 }
        let memory = try commandLine.hostFiles().filter { $0.rights == .directory }.map(\.path)
        confinement.become(policy, owning: owned + memory)
        if confinement.user != nil { confinement.groups += HandOver.readers(of: readable) }
        return confinement
    }

    /// How names of the network are found.
    private static let names = ["resolv.conf", "hosts", "nsswitch.conf", "host.conf", "gai.conf", "services"].map {
        Confinement.Rule("/etc/\($0)", .read, isOptional: true)
    }
}
