internal import CLinux
internal import Glibc
internal import IO

/// How a host confines what it starts for guests that come from elsewhere.
public struct ConfinementPolicy: Sendable, Hashable, Codable {
    /// How much of it there must be.
    public enum Strictness: String, Sendable, Hashable, Codable {
        /// Nothing but QEMU's own filter of system calls.
        case off
        /// What this host offers.
        case available
        /// All of it, or nothing is started.
        case required
    }

    /// How much of it there must be.
    public var strictness: Strictness
    /// Directories whose files guests may read, besides those of QEMU.
    public var directories: [String]
    /// The user that a program becomes; nil to stay the agent's.
    public var user: UInt32?
    /// The directories below which what belongs to that user is.
    public var roots: [String] = []

    /// Makes a policy.
    public init(_ strictness: Strictness = .available, directories: [String] = []) {
        self.strictness = strictness
        self.directories = directories
    }

    /// QEMU's filter of system calls (`-sandbox`), as strict as it can be.
    static let systemCallFilter = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

    /// What this host lacks for all of it, a sentence each; empty when it has everything.
    ///
    /// - Parameter directories: where guests' files are, with an own user each.
    public static func missing(for directories: [String] = []) -> [String] {
        var missing: [String] = []
        if LandlockRuleset.version == nil {
            missing.append(
                "The kernel has no Landlock (CONFIG_SECURITY_LANDLOCK, and 'landlock' in lsm=): QEMU can open whatever its user may"
            )
        }
        if let obstacle = obstacleToUsers(for: directories) { missing.append(obstacle) }
        return missing
    }

    /// Why guests cannot have users of their own here; nil when they can.
    ///
    /// - Parameter directories: where their files are.
    public static func obstacleToUsers(for directories: [String]) -> String? {
        let consequence = "guests run as the agent's own user, and reach each other's sockets"
        guard geteuid() == 0 else { return "The agent is not root: \(consequence)" }
        // CAP_CHOWN, CAP_KILL, CAP_SETGID, CAP_SETUID
        guard [0, 5, 6, 7].allSatisfy({ xd_has_capability($0) != 0 }) else {
            return "The agent has not the capabilities CHOWN, KILL, SETGID and SETUID: \(consequence)"
        }
        for directory in directories + ["\(BoundProcess.parent)/x"] {
            guard let closed = HandOver.closedDirectory(above: directory) else { continue }
            return
                "Other users cannot pass through \(closed) to \(directory) (chmod o+x \(closed)): \(consequence)"
        }
        return nil
    }

    /// What this host's kernel has of it, but not in its newest form, a sentence each.
    public static func limits() -> [String] {
        guard let version = LandlockRuleset.version else { return [] }
        var limits: [String] = []
        if version < 3 { limits.append("files can be emptied that QEMU's user may write (since Linux 6.2)") }
        if version < 4 { limits.append("QEMU can listen on every port (since Linux 6.7)") }
        if version < 5 { limits.append("devices that QEMU's user may open can be controlled (since Linux 6.10)") }
        if version < 6 { limits.append("abstract sockets and signals are not kept apart (since Linux 6.12)") }
        guard !limits.isEmpty else { return [] }
        return ["Landlock of this kernel is version \(version): " + limits.joined(separator: "; ")]
    }

    /// Whether what becomes another user may read a file of this host, since everybody may.
    public func canRead(_ path: String) -> Bool {
        guard user != nil else { return true }
        let real = DurableFile.resolve(path, in: "/")
        var status = stat()
        return stat(real, &status) == 0 && status.st_mode & 0o004 != 0 && HandOver.closedDirectory(above: real) == nil
    }

    /// Why what becomes another user may not read the files of a directory of this host; nil when it may.
    ///
    /// Credentials are for few: a guest's user gets the group of files that a group may read.
    public func obstacle(toReading directory: String) -> String? {
        guard user != nil else { return nil }
        for name in DurableFile.list(directory) {
            let path = "\(directory)/\(name)"
            if canRead(path) || !HandOver.readers(of: [path]).isEmpty && HandOver.closedDirectory(above: path) == nil {
                continue
            }
            return
                "The file \(path) may not be read by the user of the guest on this host; let a group read it (chgrp, chmod g+r), "
                + "and everybody pass through the directories above it"
        }
        return nil
    }

    /// The confinement of a program that works on files of a guest: an image tool, or a storage daemon.
    ///
    /// - Parameters:
    ///   - program: its name or path.
    ///   - directory: its own directory, for sockets.
    ///   - files: what it works on.
    /// - Returns: nil when nothing is confined.
    func tool(_ program: String, directory: String, files: [Confinement.Rule]) throws -> Confinement? {
        guard strictness != .off else { return nil }
        let program = try ProgramFiles(program, withData: false)
        var confinement = Confinement(
            Confinement.common + program.rules + [.init(directory, [.makeSocket, .removeFile])] + files
        )
        confinement.isWithoutNetwork = true
        let images = files.filter { $0.rights.contains(.write) }.map(\.path)
        confinement.become(self, owning: [directory] + images.map(ownPlace))
        return confinement
    }

    /// The directory of an image when that is a guest's own, else the image.
    private func ownPlace(of image: String) -> String {
        let parent = image.lastIndex(of: "/").map { String(image[..<$0]) } ?? ""
        return roots.contains { parent.hasPrefix($0 + "/") } ? parent : image
    }

    /// The confinement of a QEMU without a guest: a blank copy, or one that is asked about itself.
    ///
    /// - Parameters:
    ///   - program: its name or path.
    ///   - directories: its own directories.
    ///   - commandLine: what it is a copy of; nil for one that is only asked.
    func emulator(_ program: String, directories: [String], commandLine: GuestCommandLine? = nil) throws -> Confinement?
    {
        guard strictness != .off else { return nil }
        let program = try ProgramFiles(program, withData: true)
        let own = directories.map { Confinement.Rule($0, .directory) }
        // One that has no other accelerator does not even start without.
        let usesKVM = try commandLine?.hostFiles().contains { $0.path == "/dev/kvm" } ?? true
        let devices = usesKVM ? [Confinement.Rule("/dev/kvm", .device, isOptional: true)] : []
        var confinement = Confinement(Confinement.common + program.rules + own + devices)
        confinement.isWithoutNetwork = true
        confinement.become(self, owning: directories)
        return confinement
    }
}
