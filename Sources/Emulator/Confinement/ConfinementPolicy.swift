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

    /// Makes a policy.
    public init(_ strictness: Strictness = .available, directories: [String] = []) {
        self.strictness = strictness
        self.directories = directories
    }

    /// QEMU's filter of system calls (`-sandbox`), as strict as it can be.
    static let systemCallFilter = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

    /// What this host lacks for all of it, a sentence each; empty when it has everything.
    public static func missing() -> [String] {
        var missing: [String] = []
        if LandlockRuleset.version == nil {
            missing.append(
                "The kernel has no Landlock (CONFIG_SECURITY_LANDLOCK, and 'landlock' in lsm=): QEMU can open whatever its user may"
            )
        }
        if geteuid() != 0 {
            missing.append(
                "The agent is not root: guests run as its own user, and reach each other's sockets and its own"
            )
        }
        return missing
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
        return confinement
    }

    /// The confinement of a QEMU without a guest: a blank copy, or one that is asked about itself.
    ///
    /// - Parameters:
    ///   - program: its name or path.
    ///   - directories: its own directories.
    ///   - commandLine: what it is a copy of.
    func emulator(_ program: String, directories: [String], commandLine: GuestCommandLine? = nil) throws -> Confinement?
    {
        guard strictness != .off else { return nil }
        let program = try ProgramFiles(program, withData: true)
        let own = directories.map { Confinement.Rule($0, .directory) }
        let devices = try commandLine?.hostFiles().filter { $0.path == "/dev/kvm" } ?? []
        var confinement = Confinement(Confinement.common + program.rules + own + devices)
        confinement.isWithoutNetwork = true
        return confinement
    }
}
